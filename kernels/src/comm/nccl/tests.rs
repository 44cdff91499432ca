//! Ranks are threads here, and the library is a stand-in with switches.

use std::ffi::c_void;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use half::bf16;

use super::life::ABORT_PATIENCE;
use super::*;
use crate::cuda::{Cuda, CudaError};
use crate::stub::{Stub, counter, in_child, in_child_with, real, set};

const NCCL: [Stub; 1] = [Stub::Nccl];

fn count(name: &str) -> i64 {
    counter(Stub::Nccl, name)
}

fn switch(name: &str, value: i64) {
    set(Stub::Nccl, name, value);
}

fn options() -> NcclOptions {
    NcclOptions { init_timeout: Duration::from_secs(20), call_timeout: Duration::from_secs(20) }
}

fn short() -> NcclOptions {
    NcclOptions { init_timeout: Duration::from_millis(50), call_timeout: Duration::from_millis(50) }
}

fn solo(nccl: Nccl, options: NcclOptions) -> Result<NcclCommunicator, NcclError> {
    NcclCommunicator::init(&NcclAbort::new(nccl), &nccl.unique_id()?, (0, 1), options)
}

/// Runs `work` as each of `size` ranks of one group.
fn ranks<R: Send>(size: usize, work: impl Fn(NcclCommunicator) -> R + Sync) -> Vec<R> {
    let nccl = Nccl::open().unwrap();
    let id = nccl.unique_id().unwrap();
    thread::scope(|scope| {
        let (id, work) = (&id, &work);
        let join = |rank| {
            scope.spawn(move || {
                work(NcclCommunicator::init(&NcclAbort::new(nccl), id, (rank, size), options()).unwrap())
            })
        };
        let threads: Vec<_> = (0..size).map(join).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn address<T>(values: &[T]) -> u64 {
    values.as_ptr() as u64
}

fn all_done() -> Result<bool, CudaError> {
    Ok(count("pending") == 0)
}

fn wait(comm: &NcclCommunicator) -> Result<(), NcclError> {
    comm.wait(Duration::from_secs(20), all_done)
}

const NO_STREAM: *mut c_void = std::ptr::null_mut();

/// A sum in place.
fn all_reduce(comm: &NcclCommunicator, values: &mut [f32]) -> Result<(), NcclError> {
    let at = address(values);
    // SAFETY: the stand-in works on this process's memory, and each test waits before `values` goes.
    unsafe { comm.all_reduce_raw::<f32>(at, at, values.len(), NO_STREAM) }
}

/// Nothing was done to a communicator after its end or from two threads at once.
fn assert_orderly() {
    assert_eq!(count("violations"), 0);
}

#[test]
fn without_a_library_the_names_are_told() {
    let env = [(NCCL_LIBRARY_VARIABLE, "/nowhere/libnccl.so.9")];
    in_child((module_path!(), "without_a_library_the_names_are_told"), &NCCL, &env, || {
        // What the variable names is the only one tried, though another is there.
        let NcclError::NoLibrary { tried } = Nccl::open().unwrap_err() else { panic!() };
        assert_eq!(tried.len(), 1);
        assert!(tried[0].contains("/nowhere/libnccl.so.9") && !tried[0].contains('\n'), "{tried:?}");
    });
}

#[test]
fn the_variable_names_the_library() {
    let path = Stub::Nccl.folder().join("libnccl.so.2");
    let env = [(NCCL_LIBRARY_VARIABLE, path.to_str().unwrap()), ("STUB_NCCL_VERSION", "22907")];
    in_child((module_path!(), "the_variable_names_the_library"), &[], &env, || {
        assert_eq!(Nccl::open().unwrap().version(), "2.29.7");
    });
}

#[test]
fn an_old_library_is_refused() {
    let env = [("STUB_NCCL_VERSION", "21705")];
    in_child((module_path!(), "an_old_library_is_refused"), &NCCL, &env, || {
        let error = Nccl::open().unwrap_err();
        assert_eq!(error.to_string(), "NCCL is too old: it is version 2.17.5, and 2.18.0 is needed");
    });
}

#[test]
fn another_library_under_the_name_is_refused() {
    let other = Stub::Nvrtc.folder().join("libnvrtc.so");
    let env = [(NCCL_LIBRARY_VARIABLE, other.to_str().unwrap())];
    in_child((module_path!(), "another_library_under_the_name_is_refused"), &[], &env, || {
        assert_eq!(Nccl::open().unwrap_err(), NcclError::NoSymbol { symbol: "ncclGetVersion" });
    });
}

#[test]
fn ids_travel_as_bytes_and_are_not_printed() {
    in_child((module_path!(), "ids_travel_as_bytes_and_are_not_printed"), &NCCL, &[], || {
        let nccl = Nccl::open().unwrap();
        let (first, second) = (nccl.unique_id().unwrap(), nccl.unique_id().unwrap());
        assert_ne!(first, second);
        assert_eq!(NcclUniqueId::from_bytes(first.as_bytes()).unwrap(), first);
        assert_eq!(
            NcclUniqueId::from_bytes(&[0; 127]).unwrap_err(),
            NcclError::UniqueId { expected: 128, actual: 127 }
        );
        assert_eq!(format!("{first:?}"), "NcclUniqueId(..)");
    });
}

#[test]
fn collectives_do_what_they_say() {
    in_child((module_path!(), "collectives_do_what_they_say"), &NCCL, &[], || {
        // The first calls take a while, as connections are made.
        switch("polls", 3);
        let ranks = ranks(3, |comm| {
            let rank = comm.rank();
            assert_eq!(comm.size(), 3);
            let sums = vec![rank as f32 + 1.0; 5];
            let halves = [bf16::from_f32(rank as f32), bf16::from_f32(0.5)];
            let sent = [10 * rank as i32, 10 * rank as i32 + 1];
            let gathered = vec![-1i32; 6];
            let spread = vec![rank as u8; 4];
            let (sums_at, halves_at, spread_at) = (address(&sums), address(&halves), address(&spread));
            // SAFETY: the stand-in works on this process's memory, which lives until all are done.
            unsafe {
                comm.all_reduce_raw::<f32>(sums_at, sums_at, 5, NO_STREAM).unwrap();
                comm.all_reduce_raw::<bf16>(halves_at, halves_at, 2, NO_STREAM).unwrap();
                comm.all_gather_raw::<i32>(address(&sent), address(&gathered), 2, NO_STREAM).unwrap();
                comm.broadcast_raw::<u8>(spread_at, 4, 2, NO_STREAM).unwrap();
            }
            wait(&comm).unwrap();
            comm.close(Duration::from_secs(20)).unwrap();
            (sums, halves.map(bf16::to_f32), gathered, spread)
        });
        for (sums, halves, gathered, spread) in ranks {
            assert_eq!((sums, halves), (vec![6.0; 5], [3.0, 1.5]));
            assert_eq!((gathered, spread), (vec![0, 1, 10, 11, 20, 21], vec![2; 4]));
        }
        let counts = ["collectives", "finalizes", "destroys", "aborts"].map(count);
        assert_eq!(counts, [12, 3, 3, 0]);
        assert_orderly();
    });
}

#[test]
fn slices_of_a_device_are_queued_on_its_stream() {
    let stubs = [Stub::Driver, Stub::Nvrtc, Stub::CublasLt, Stub::Nccl];
    in_child((module_path!(), "slices_of_a_device_are_queued_on_its_stream"), &stubs, &[], || {
        let cuda = Cuda::open(0).unwrap();
        let comm = solo(Nccl::open().unwrap(), options()).unwrap();
        let (own, all) = (cuda.alloc(8).unwrap(), cuda.alloc(8).unwrap());
        own.as_slice::<f32>().write(&[1.0, 2.0]).unwrap();
        comm.all_reduce(own.as_slice::<f32>()).unwrap();
        comm.all_gather(own.as_slice::<f32>(), all.as_slice()).unwrap();
        comm.broadcast(all.as_slice::<f32>(), 0).unwrap();
        comm.wait(Duration::from_secs(20), || cuda.is_idle()).unwrap();
        let mut got = [0.0; 2];
        all.as_slice::<f32>().read(&mut got).unwrap();
        assert_eq!((got, count("collectives")), ([1.0, 2.0], 3));
        assert_orderly();
    });
}

#[test]
fn a_failing_init_is_quoted() {
    in_child((module_path!(), "a_failing_init_is_quoted"), &NCCL, &[], || {
        let nccl = Nccl::open().unwrap();
        switch("init_code", 5);
        let error = solo(nccl, options()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "ncclCommInitRankConfig failed: ncclInvalidUsage (5): words of the stub"
        );
        // A result that this code has no name for.
        switch("init_code", 4711);
        let NcclError::Failed { code, name, .. } = solo(nccl, options()).unwrap_err() else { panic!() };
        assert_eq!((code, name), (4711, "a result without a name here"));
        // A failure while joining.
        switch("init_code", 0);
        switch("init_async", 6);
        let abort = NcclAbort::new(nccl);
        let id = nccl.unique_id().unwrap();
        let error = NcclCommunicator::init(&abort, &id, (0, 2), options()).unwrap_err();
        assert!(matches!(error, NcclError::Failed { code: 6, name: "ncclRemoteError", .. }), "{error}");
        assert!(abort.is_aborted());
        assert_eq!(count("aborts"), 1);
        // In the next epoch all is well.
        switch("init_async", 0);
        let comm = solo(nccl, options()).unwrap();
        let mut values = [2.0];
        all_reduce(&comm, &mut values).unwrap();
        wait(&comm).unwrap();
        assert_orderly();
    });
}

#[test]
fn an_id_that_cannot_be_made_is_quoted() {
    let env = [("STUB_NCCL_ID", "2")];
    in_child((module_path!(), "an_id_that_cannot_be_made_is_quoted"), &NCCL, &env, || {
        let error = Nccl::open().unwrap().unique_id().unwrap_err();
        assert_eq!(error.to_string(), "ncclGetUniqueId failed: ncclSystemError (2): words of the stub");
    });
}

#[test]
fn an_init_that_never_completes_ends_at_its_deadline() {
    in_child((module_path!(), "an_init_that_never_completes_ends_at_its_deadline"), &NCCL, &[], || {
        let nccl = Nccl::open().unwrap();
        let id = nccl.unique_id().unwrap();
        let start = Instant::now();
        let error = NcclCommunicator::init(&NcclAbort::new(nccl), &id, (0, 2), short()).unwrap_err();
        assert_eq!(error, NcclError::Timeout { what: "ncclCommInitRankConfig", ms: 50 });
        assert!(start.elapsed() >= Duration::from_millis(50));
        assert_eq!(count("aborts"), 1);
        assert_orderly();
    });
}

#[test]
fn an_init_is_given_up_from_another_thread() {
    in_child((module_path!(), "an_init_is_given_up_from_another_thread"), &NCCL, &[], || {
        let nccl = Nccl::open().unwrap();
        let id = nccl.unique_id().unwrap();
        let abort = NcclAbort::new(nccl);
        thread::scope(|scope| {
            let init = scope.spawn(|| NcclCommunicator::init(&abort, &id, (0, 2), options()).map(drop));
            while count("inits") == 0 {
                thread::yield_now();
            }
            abort.abort();
            assert_eq!(init.join().unwrap().unwrap_err(), NcclError::Aborted);
        });
        assert_eq!(count("aborts"), 1);
        // Given up before it exists, it never does.
        let early = NcclAbort::new(nccl);
        early.abort();
        let error = NcclCommunicator::init(&early, &id, (0, 2), options()).unwrap_err();
        assert_eq!((error, count("inits"), count("aborts")), (NcclError::Aborted, 1, 1));
        assert_orderly();
    });
}

#[test]
fn an_error_in_mid_collective_ends_the_wait_and_the_communicator() {
    let test = "an_error_in_mid_collective_ends_the_wait_and_the_communicator";
    in_child((module_path!(), test), &NCCL, &[], || {
        let nccl = Nccl::open().unwrap();
        let comm = solo(nccl, options()).unwrap();
        let mut values = [1.0; 4];
        switch("stuck", 1);
        all_reduce(&comm, &mut values).unwrap();
        let error = thread::scope(|scope| {
            let waiting = scope.spawn(|| wait(&comm));
            thread::sleep(Duration::from_millis(20));
            assert!(!waiting.is_finished());
            switch("async_error", 6);
            waiting.join().unwrap().unwrap_err()
        });
        assert_eq!(error.to_string(), "a collective failed: ncclRemoteError (6): words of the stub");
        assert_eq!(count("aborts"), 1);
        // It stays unusable, whatever the library says now.
        switch("async_error", 0);
        assert_eq!(all_reduce(&comm, &mut values).unwrap_err(), NcclError::Aborted);
        assert_eq!(comm.wait(Duration::ZERO, || Ok(false)).unwrap_err(), NcclError::Aborted);
        assert_eq!(comm.close(Duration::ZERO).unwrap_err(), NcclError::Aborted);
        // The next epoch's is another.
        switch("stuck", 0);
        switch("pending", 0);
        let comm = solo(nccl, options()).unwrap();
        all_reduce(&comm, &mut values).unwrap();
        wait(&comm).unwrap();
        assert_orderly();
    });
}

#[test]
fn a_hang_ends_at_the_deadline() {
    in_child((module_path!(), "a_hang_ends_at_the_deadline"), &NCCL, &[], || {
        let comm = solo(Nccl::open().unwrap(), options()).unwrap();
        switch("stuck", 1);
        all_reduce(&comm, &mut [1.0; 4]).unwrap();
        let start = Instant::now();
        let error = comm.wait(Duration::from_millis(80), all_done).unwrap_err();
        assert_eq!(error, NcclError::Timeout { what: "a step's collectives", ms: 80 });
        assert!(start.elapsed() >= Duration::from_millis(80));
        assert_eq!(count("aborts"), 1);
        drop(comm);
        assert_eq!(count("aborts"), 1);
        assert_orderly();
    });
}

#[test]
fn a_hang_is_given_up_from_another_thread_once() {
    in_child((module_path!(), "a_hang_is_given_up_from_another_thread_once"), &NCCL, &[], || {
        let comm = solo(Nccl::open().unwrap(), options()).unwrap();
        switch("stuck", 1);
        all_reduce(&comm, &mut [1.0; 4]).unwrap();
        let handle = comm.abort_handle();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| wait(&comm));
            thread::sleep(Duration::from_millis(10));
            let handles: Vec<_> = (0..4).map(|_| handle.clone()).collect();
            for handle in handles {
                scope.spawn(move || handle.abort());
            }
            assert_eq!(waiting.join().unwrap().unwrap_err(), NcclError::Aborted);
        });
        handle.abort();
        drop(comm);
        assert_eq!(count("aborts"), 1);
        assert_orderly();
    });
}

#[test]
fn giving_up_while_a_call_is_queueing_waits_for_it() {
    in_child((module_path!(), "giving_up_while_a_call_is_queueing_waits_for_it"), &NCCL, &[], || {
        let comm = solo(Nccl::open().unwrap(), options()).unwrap();
        let handle = comm.abort_handle();
        switch("call_ms", 300);
        let queueing = |inside: &mut dyn FnMut()| {
            thread::scope(|scope| {
                let queueing = scope.spawn(|| all_reduce(&comm, &mut [1.0; 4]));
                while count("in_call") == 0 {
                    thread::yield_now();
                }
                inside();
                queueing.join().unwrap()
            })
        };
        let error = queueing(&mut || {
            handle.abort();
            assert_eq!(count("aborts"), 1);
        });
        assert_eq!(error.unwrap_err(), NcclError::Aborted);
        assert_orderly();
    });
}

#[test]
fn a_call_longer_than_the_patience_gives_up_by_itself() {
    in_child((module_path!(), "a_call_longer_than_the_patience_gives_up_by_itself"), &NCCL, &[], || {
        let comm = solo(Nccl::open().unwrap(), options()).unwrap();
        let handle = comm.abort_handle();
        switch("call_ms", ABORT_PATIENCE.as_millis() as i64 + 700);
        thread::scope(|scope| {
            let queueing = scope.spawn(|| all_reduce(&comm, &mut [1.0; 4]));
            while count("in_call") == 0 {
                thread::yield_now();
            }
            handle.abort();
            // It came back without having entered the communicator beside the call.
            assert_eq!(count("aborts"), 0);
            assert_eq!(queueing.join().unwrap().unwrap_err(), NcclError::Aborted);
        });
        assert!(handle.wait_released(Duration::from_secs(20)));
        assert_eq!(count("aborts"), 1);
        assert_orderly();
    });
}

#[test]
fn graphs_that_hold_collectives_delay_nothing_but_the_release() {
    let test = "graphs_that_hold_collectives_delay_nothing_but_the_release";
    in_child((module_path!(), test), &NCCL, &[], || {
        let nccl = Nccl::open().unwrap();
        let comm = solo(nccl, options()).unwrap();
        let handle = comm.abort_handle();
        assert!(!handle.wait_released(Duration::ZERO));
        switch("graphs", 1);
        switch("stuck", 1);
        all_reduce(&comm, &mut [1.0; 4]).unwrap();
        // The thread that finds the failure comes back, although it is the one that has the graphs.
        let start = Instant::now();
        assert!(matches!(comm.wait(Duration::from_millis(10), all_done), Err(NcclError::Timeout { .. })));
        assert!(start.elapsed() < Duration::from_secs(10));
        assert_eq!(count("aborts"), 1);
        assert!(!handle.wait_released(Duration::from_millis(20)));
        drop(comm);
        assert!(!handle.wait_released(Duration::ZERO));
        switch("graphs", 0);
        assert!(handle.wait_released(Duration::from_secs(20)));
        assert_eq!(count("aborts"), 1);
        // A communicator that never was has nothing to be released, and one that was left in order has been.
        let never = NcclAbort::new(nccl);
        never.abort();
        assert!(never.wait_released(Duration::ZERO));
        switch("stuck", 0);
        let comm = solo(nccl, options()).unwrap();
        let handle = comm.abort_handle();
        comm.close(Duration::from_secs(20)).unwrap();
        assert!(handle.wait_released(Duration::ZERO));
        assert_orderly();
    });
}

#[test]
fn a_dropped_communicator_is_given_up_whoever_has_its_handle() {
    let test = "a_dropped_communicator_is_given_up_whoever_has_its_handle";
    in_child((module_path!(), test), &NCCL, &[], || {
        let comm = solo(Nccl::open().unwrap(), options()).unwrap();
        let handle = comm.abort_handle();
        drop(comm);
        assert!(handle.is_aborted() && handle.wait_released(Duration::from_secs(20)));
        assert_eq!(count("aborts"), 1);
        assert_orderly();
    });
}

#[test]
fn aborts_at_any_moment_are_orderly() {
    in_child((module_path!(), "aborts_at_any_moment_are_orderly"), &NCCL, &[], || {
        let nccl = Nccl::open().unwrap();
        switch("polls", 2);
        for round in 0..200u64 {
            let (abort, id) = (NcclAbort::new(nccl), nccl.unique_id().unwrap());
            let (ready, started) = mpsc::channel();
            thread::scope(|scope| {
                scope.spawn(|| {
                    ready.send(()).unwrap();
                    let Ok(comm) = NcclCommunicator::init(&abort, &id, (0, 1), options()) else { return };
                    let mut values = [1.0];
                    while all_reduce(&comm, &mut values).and_then(|()| wait(&comm)).is_ok() {}
                });
                started.recv().unwrap();
                thread::sleep(Duration::from_micros(round * 3));
                abort.abort();
            });
            assert!(abort.wait_released(Duration::from_secs(20)));
            switch("pending", 0);
        }
        assert_eq!(count("inits"), count("aborts"));
        assert!(count("collectives") > 0);
        assert_orderly();
    });
}

#[test]
fn a_collective_that_is_refused_ends_the_communicator() {
    in_child((module_path!(), "a_collective_that_is_refused_ends_the_communicator"), &NCCL, &[], || {
        let nccl = Nccl::open().unwrap();
        let comm = solo(nccl, options()).unwrap();
        switch("call_code", 1);
        let error = all_reduce(&comm, &mut [1.0]).unwrap_err();
        assert!(matches!(error, NcclError::Failed { call: "ncclAllReduce", code: 1, .. }), "{error}");
        switch("call_code", 0);
        assert_eq!(all_reduce(&comm, &mut [1.0]).unwrap_err(), NcclError::Aborted);
        // One whose connections are never made.
        let comm = solo(nccl, short()).unwrap();
        switch("polls", 1 << 30);
        let error = all_reduce(&comm, &mut [1.0]).unwrap_err();
        assert_eq!(error, NcclError::Timeout { what: "ncclAllReduce", ms: 50 });
        assert_eq!(count("aborts"), 2);
        assert_orderly();
    });
}

#[test]
fn a_fault_of_the_device_gives_the_communicator_up() {
    in_child((module_path!(), "a_fault_of_the_device_gives_the_communicator_up"), &NCCL, &[], || {
        let comm = solo(Nccl::open().unwrap(), options()).unwrap();
        let fault = CudaError::Capture { reason: "some fault".into() };
        let error = comm.wait(Duration::from_secs(20), || Err(fault.clone())).unwrap_err();
        assert_eq!(error, NcclError::Device(fault));
        assert_eq!(count("aborts"), 1);
        assert_orderly();
    });
}

#[test]
fn leaving_that_others_do_not_join_in_ends_at_its_deadline() {
    in_child((module_path!(), "leaving_that_others_do_not_join_in_ends_at_its_deadline"), &NCCL, &[], || {
        let comm = solo(Nccl::open().unwrap(), options()).unwrap();
        switch("polls", 1 << 30);
        let error = comm.close(Duration::from_millis(30)).unwrap_err();
        assert_eq!(error, NcclError::Timeout { what: "ncclCommFinalize", ms: 30 });
        assert_eq!(["aborts", "destroys"].map(count), [1, 0]);
        assert_orderly();
    });
}

#[test]
fn one_rank_that_dies_lets_the_others_go() {
    in_child((module_path!(), "one_rank_that_dies_lets_the_others_go"), &NCCL, &[], || {
        let errors = ranks(3, |comm| {
            if comm.rank() == 2 {
                return None;
            }
            let mut values = [1.0; 4];
            all_reduce(&comm, &mut values).unwrap();
            let error = comm.wait(Duration::from_millis(100), all_done).unwrap_err();
            Some(error)
        });
        assert_eq!(errors[2], None);
        for error in &errors[..2] {
            assert!(matches!(error, Some(NcclError::Timeout { .. })), "{error:?}");
        }
        assert_eq!(count("aborts"), 3);
        assert_orderly();
    });
}

/// As far as it goes without a GPU: all functions are there, ids are made, and making a communicator fails in NCCL's own words.
#[test]
fn the_real_nccl_answers() {
    let Some(folder) = real("nccl", "libnccl.so.2") else { return };
    in_child_with((module_path!(), "the_real_nccl_answers"), &[folder], &[], || {
        let nccl = Nccl::open().unwrap();
        assert!(nccl.version().starts_with("2."), "{nccl:?}");
        let (first, second) = (nccl.unique_id().unwrap(), nccl.unique_id().unwrap());
        assert_ne!(first, second);
        let abort = NcclAbort::new(nccl);
        match NcclCommunicator::init(&abort, &first, (0, 1), options()) {
            Ok(comm) => comm.close(Duration::from_secs(20)).unwrap(),
            Err(error) => {
                println!("{error}");
                assert!(matches!(error, NcclError::Failed { .. }), "{error}");
            }
        }
        abort.abort();
    });
}
