use super::*;
use crate::cuda::LaunchShape;
use crate::cuda::tests::{ALL, module, open};
use crate::stub::in_child;

#[test]
fn buckets_hold_their_rows_and_no_smaller_one_does() {
    assert_eq!(bucket_of(0), None);
    assert_eq!(bucket_of(257), None);
    assert!(GRAPH_BUCKETS.is_sorted());
    for rows in 1..=256 {
        let bucket = bucket_of(rows).unwrap();
        assert!(bucket >= rows);
        assert!(GRAPH_BUCKETS.iter().all(|&other| other >= bucket || other < rows), "{rows} in {bucket}");
    }
    assert_eq!(
        [1, 3, 9, 17, 33, 65, 97, 129, 225].map(|rows| bucket_of(rows).unwrap()),
        [1, 4, 16, 24, 48, 96, 128, 160, 256]
    );
}

#[test]
fn what_is_captured_happens_at_each_replay_only() {
    in_child((module_path!(), "what_is_captured_happens_at_each_replay_only"), &ALL, &[], || {
        let cuda = open();
        let add = module(&cuda).kernel("add").unwrap();
        let buffer = cuda.alloc_zeroed(16).unwrap();
        let values = buffer.as_slice::<i32>();
        let args = [values.into(), values.into(), 5.into(), 4.into()];
        let mut graph = cuda
            .capture(|| {
                // SAFETY: the kernel's parameters; the buffer holds four integers.
                unsafe { add.launch(LaunchShape::linear(1, 4), &args) }?;
                values.slice(0..1).copy_from(&values.slice(1..2))?;
                values.slice(3..4).fill_bytes(0)
            })
            .unwrap();
        let read = || {
            let mut got = [0; 4];
            values.read(&mut got).unwrap();
            got
        };
        assert_eq!(read(), [0; 4]);
        // SAFETY: the buffer and the module are alive.
        unsafe { graph.replay() }.unwrap();
        assert_eq!(read(), [5, 5, 5, 0]);
        // SAFETY: as above.
        unsafe { graph.replay() }.unwrap();
        assert_eq!(read(), [10, 10, 10, 0]);
    });
}

#[test]
fn what_cannot_be_captured_is_refused_and_the_stream_goes_on() {
    let test = "what_cannot_be_captured_is_refused_and_the_stream_goes_on";
    in_child((module_path!(), test), &ALL, &[], || {
        let cuda = open();
        let loaded = module(&cuda);
        let buffer = cuda.alloc_zeroed(16).unwrap();
        let bytes = buffer.as_slice::<u8>();
        let mut pinned = cuda.alloc_pinned(16).unwrap();
        let mut works: Vec<Box<dyn FnMut() -> Result<(), CudaError>>> = vec![
            Box::new(|| cuda.alloc(4).map(drop)),
            Box::new(|| cuda.alloc_pinned(4).map(drop)),
            Box::new(|| cuda.synchronize()),
            Box::new(|| cuda.is_idle().map(drop)),
            Box::new(|| bytes.write(&[0; 16])),
            Box::new(|| bytes.read(&mut [0; 16])),
            Box::new(|| bytes.upload(&mut pinned, 0)),
            Box::new(|| cuda.capture(|| Ok(())).map(drop)),
        ];
        for work in &mut works {
            let error = cuda.capture(work).unwrap_err();
            assert!(matches!(error, CudaError::InCapture { .. }), "{error}");
        }
        drop(works);
        // Nothing is a graph too.
        let mut empty = cuda.capture(|| Ok(())).unwrap();
        // SAFETY: it uses nothing.
        unsafe { empty.replay() }.unwrap();
        let panic = std::panic::catch_unwind(AssertUnwindSafe(|| cuda.capture(|| panic!("inside"))));
        assert_eq!(*panic.unwrap_err().downcast::<&str>().unwrap(), "inside");
        // A call of somebody else's that breaks the capture.
        let error = cuda
            .capture(|| {
                // SAFETY: the stream is alive.
                let _ = unsafe { cudarc::driver::result::stream::synchronize(cuda.cu_stream()) };
                Ok(())
            })
            .unwrap_err();
        assert!(error.to_string().contains("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"), "{error}");
        // The stream works, and so does a capture.
        bytes.fill_bytes(3).unwrap();
        cuda.synchronize().unwrap();
        let mut graph = cuda.capture(|| bytes.fill_bytes(4)).unwrap();
        // SAFETY: the buffer is alive.
        unsafe { graph.replay() }.unwrap();
        let mut got = [0; 16];
        bytes.read(&mut got).unwrap();
        assert_eq!(got, [4; 16]);
        drop(loaded);
    });
}
