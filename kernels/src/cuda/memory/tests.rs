use crate::cuda::CudaError;
use crate::cuda::tests::{ALL, open};
use crate::stub::{Stub, counter, in_child, set};

#[test]
fn what_is_written_is_read() {
    in_child((module_path!(), "what_is_written_is_read"), &ALL, &[], || {
        let cuda = open();
        let buffer = cuda.alloc_zeroed(40).unwrap();
        let all = buffer.as_slice::<i32>();
        assert_eq!((all.len(), all.bytes()), (10, 40));
        all.slice(2..5).write(&[7, 8, 9]).unwrap();
        let other = cuda.alloc(12).unwrap();
        other.as_slice::<i32>().copy_from(&all.slice(2..5)).unwrap();
        all.slice(9..10).copy_from(&other.as_slice::<i32>().slice(2..3)).unwrap();
        let mut values = [1; 10];
        all.read(&mut values).unwrap();
        assert_eq!(values, [0, 0, 7, 8, 9, 0, 0, 0, 0, 9]);
        let mut bytes = [0u8; 4];
        buffer.slice::<u8>(12, 4).read(&mut bytes).unwrap();
        assert_eq!(i32::from_le_bytes(bytes), 8);
    });
}

#[test]
fn pinned_memory_shows_itself_only_after_the_copy() {
    in_child((module_path!(), "pinned_memory_shows_itself_only_after_the_copy"), &ALL, &[], || {
        let cuda = open();
        let buffer = cuda.alloc(16).unwrap();
        let mut pinned = cuda.alloc_pinned(32).unwrap();
        assert_eq!(pinned.read::<u8>(0, 32).unwrap(), [0; 32]);
        pinned.write::<u32>(16, 4).unwrap().copy_from_slice(&[1, 2, 3, 4]);
        let waits = || counter(Stub::Driver, "waits");
        let before = waits();
        buffer.as_slice::<u32>().upload(&mut pinned, 16).unwrap();
        buffer.as_slice::<u32>().download(&mut pinned, 0).unwrap();
        assert_eq!(waits(), before);
        assert!(!pinned.is_ready().unwrap());
        assert_eq!(pinned.read::<u32>(0, 8).unwrap(), [1, 2, 3, 4, 1, 2, 3, 4]);
        assert_eq!(waits(), before + 1);
        // Dropped with a copy in flight: it waits, so the copy does not write to memory that is gone.
        buffer.as_slice::<u32>().download(&mut pinned, 0).unwrap();
        drop(pinned);
        assert_eq!(waits(), before + 1, "it asks again and again instead, for a device may hang");
        assert_eq!(counter(Stub::Driver, "unpinned"), 1);
    });
}

#[test]
fn a_stuck_device_can_be_told_by_asking() {
    in_child((module_path!(), "a_stuck_device_can_be_told_by_asking"), &ALL, &[], || {
        let cuda = open();
        let buffer = cuda.alloc(16).unwrap();
        let mut pinned = cuda.alloc_pinned(16).unwrap();
        assert!(cuda.is_idle().unwrap());
        set(Stub::Driver, "stuck", 1);
        buffer.as_slice::<u8>().download(&mut pinned, 0).unwrap();
        for _ in 0..3 {
            assert!(!pinned.is_ready().unwrap() && !cuda.is_idle().unwrap());
        }
        set(Stub::Driver, "stuck", 0);
        assert!(!pinned.is_ready().unwrap());
        assert!(pinned.is_ready().unwrap() && cuda.is_idle().unwrap());
        // What is dropped while it hangs stays where it is, and whoever drops it goes on.
        set(Stub::Driver, "stuck", 1);
        buffer.as_slice::<u8>().download(&mut pinned, 0).unwrap();
        drop(pinned);
        assert_eq!(counter(Stub::Driver, "unpinned"), 0);
    });
}

#[test]
fn a_full_device_says_what_is_left() {
    let env = [("STUB_MEMORY", "1000")];
    in_child((module_path!(), "a_full_device_says_what_is_left"), &ALL, &env, || {
        let cuda = open();
        let held = cuda.alloc(600).unwrap();
        let error = cuda.alloc(401).unwrap_err();
        let expected = CudaError::DeviceMemory { asked_bytes: 401, free_bytes: 400, total_bytes: 1000 };
        assert_eq!(error, expected);
        drop(held);
        cuda.alloc(1000).unwrap();
        // No bytes are a buffer too.
        assert!(cuda.alloc_zeroed(0).unwrap().as_slice::<f32>().is_empty());
        set(Stub::Driver, "refuse_pinned", 1);
        assert_eq!(cuda.alloc_pinned(64).unwrap_err(), CudaError::PinnedMemory { asked_bytes: 64 });
        let counts = ["allocations", "frees"].map(|name| counter(Stub::Driver, name));
        assert_eq!(counts, [3, 3]);
    });
}

#[test]
fn ranges_outside_are_refused() {
    in_child((module_path!(), "ranges_outside_are_refused"), &ALL, &[], || {
        let cuda = open();
        let buffer = cuda.alloc(16).unwrap();
        let mut pinned = cuda.alloc_pinned(8).unwrap();
        let refused =
            |work: &mut dyn FnMut()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err();
        assert!(refused(&mut || _ = buffer.slice::<i32>(0, 5).len()));
        assert!(refused(&mut || _ = buffer.slice::<i32>(2, 1).len()));
        assert!(refused(&mut || _ = buffer.slice::<u8>(1, usize::MAX).len()));
        assert!(refused(&mut || _ = buffer.as_slice::<u8>().slice(3..17).len()));
        assert!(refused(&mut || buffer.as_slice::<u8>().upload(&mut pinned, 0).unwrap()));
        assert!(refused(&mut || buffer.slice::<u8>(0, 8).download(&mut pinned, 1).unwrap()));
        assert!(refused(&mut || buffer.as_slice::<u8>().write(&[0; 15]).unwrap()));
        let (head, tail) = (buffer.slice::<u8>(0, 9), buffer.slice::<u8>(7, 9));
        assert!(refused(&mut || head.copy_from(&tail).unwrap()));
        assert!(refused(&mut || _ = pinned.write::<u32>(4, 2).is_ok()));
    });
}
