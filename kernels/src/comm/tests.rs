use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::cpu::testing::Random;
use crate::cpu::{Cpu, CpuOptions};

const OPTIONS: TcpOptions = TcpOptions { timeout: Duration::from_secs(20), spin: false };

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

/// Communicators of all ranks of a group in this process.
fn group(size: usize, options: TcpOptions) -> Vec<TcpCommunicator> {
    let mut peers: Vec<Vec<Option<TcpStream>>> =
        (0..size).map(|_| (0..size).map(|_| None).collect()).collect();
    for low in 0..size {
        for high in low + 1..size {
            let (near, far) = pair();
            peers[low][high] = Some(near);
            peers[high][low] = Some(far);
        }
    }
    let of_rank = |(rank, peers)| TcpCommunicator::new(rank, peers, options).unwrap();
    peers.into_iter().enumerate().map(of_rank).collect()
}

/// Runs `work` on every rank, each on a thread of its own.
fn on_all<T: Send>(ranks: &mut [TcpCommunicator], work: impl Fn(&mut TcpCommunicator) -> T + Sync) -> Vec<T> {
    let work = &work;
    thread::scope(|scope| {
        let running: Vec<_> = ranks.iter_mut().map(|rank| scope.spawn(move || work(rank))).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn cpu() -> Cpu {
    Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap()
}

/// The fixed tree in plain words: balanced inside groups of the power-of-two factor, groups in order.
fn tree(parts: &[f32]) -> f32 {
    fn balanced(parts: &[f32]) -> f32 {
        match parts {
            [one] => *one,
            _ => balanced(&parts[..parts.len() / 2]) + balanced(&parts[parts.len() / 2..]),
        }
    }
    let group = parts.len() & parts.len().wrapping_neg();
    parts.chunks(group).map(balanced).reduce(|total, group| total + group).unwrap()
}

#[test]
fn every_rank_gets_the_sum_in_the_order_of_the_tree() {
    for (size, parts) in [(2, 1), (2, 3), (3, 1), (3, 2), (4, 1), (5, 1), (8, 1), (4, 3)] {
        // Small ones go in one round trip, large ones are split; rows that the ranks do not divide among them evenly.
        for (rows, columns) in [(1, 1), (1, 48), (7, 48), (67, 1040)] {
            let len = rows * columns;
            let mut random = Random::new(len as u64);
            let all: Vec<Vec<f32>> = (0..size).map(|_| random.vec(parts * len)).collect();
            let (bias, residual) = (random.vec(columns), random.vec(len));
            let expected: Vec<f32> = (0..len)
                .map(|at| {
                    let of_all: Vec<f32> =
                        (0..size * parts).map(|part| all[part / parts][part % parts * len + at]).collect();
                    residual[at] + (tree(&of_all) + bias[at % columns])
                })
                .collect();
            let outs = on_all(&mut group(size, OPTIONS), |rank| {
                let cpu = cpu();
                let (mut gathered, mut out) = (vec![0.0; size * parts * len], residual.clone());
                let sum = Sum { parts, columns, bias: Some(&bias) };
                for _ in 0..2 {
                    out.copy_from_slice(&residual);
                    rank.all_reduce(&cpu.team(), &all[rank.rank()], &sum, &mut gathered, &mut out).unwrap();
                }
                out
            });
            for out in outs {
                assert!(out == expected, "{size} ranks with {parts} parts of {rows} x {columns}");
            }
        }
    }
}

#[test]
fn parts_of_any_length_are_gathered_in_order() {
    let lengths = [3, 0, 70_000, 1];
    let mut end = 0;
    let ranges: Vec<Range<usize>> = lengths
        .iter()
        .map(|len| {
            end += len;
            end - len..end
        })
        .collect();
    let expected: Vec<f32> = (0..end).map(|at| at as f32).collect();
    let found = on_all(&mut group(lengths.len(), OPTIONS), |rank| {
        let mut all = vec![f32::NAN; end];
        let own = ranges[rank.rank()].clone();
        all[own.clone()].copy_from_slice(&expected[own]);
        rank.all_gather(&ranges, &mut all).unwrap();
        let own = &expected[ranges[rank.rank()].clone()];
        let mut storage: Vec<Vec<f32>> = lengths.iter().map(|&len| vec![0.0; len]).collect();
        let mut parts: Vec<&mut [f32]> = storage.iter_mut().map(Vec::as_mut_slice).collect();
        let is_root = rank.rank() == 0;
        rank.gather(own, if is_root { &mut parts } else { &mut [] }).unwrap();
        (all, is_root.then(|| storage.concat()))
    });
    for (all, gathered) in found {
        assert_eq!(all, expected);
        if let Some(gathered) = gathered {
            assert_eq!(gathered[lengths[0]..], expected[lengths[0]..]);
        }
    }
}

/// More than the sockets' buffers hold, in both directions at once.
#[test]
fn long_transfers_do_not_wait_for_each_other() {
    let len = 4 << 20;
    let found = on_all(&mut group(3, TcpOptions { spin: true, ..OPTIONS }), |rank| {
        let own = vec![rank.rank() as f32 + 1.0; len];
        let mut storage = vec![vec![0.0; len]; 3];
        let mut incoming: Vec<&mut [f32]> = storage.iter_mut().map(Vec::as_mut_slice).collect();
        rank.exchange(&[&own[..]; 3], &mut incoming).unwrap();
        storage
            .iter()
            .enumerate()
            .filter(|(peer, _)| *peer != rank.rank())
            .all(|(peer, values)| values.iter().all(|&value| value == peer as f32 + 1.0))
    });
    assert_eq!(found, [true; 3]);
}

fn receive(rank: &mut TcpCommunicator, len: usize) -> Result<(), CommError> {
    let size = rank.size();
    let own = vec![0.0; len];
    let mut storage = vec![vec![0.0; len]; size];
    let mut incoming: Vec<&mut [f32]> = storage.iter_mut().map(Vec::as_mut_slice).collect();
    rank.exchange(&vec![&own[..]; size], &mut incoming)
}

#[test]
fn an_abort_ends_a_wait_at_once_and_for_ever() {
    for spin in [false, true] {
        let mut ranks = group(2, TcpOptions { spin, ..OPTIONS });
        let handle = ranks[0].abort_handle();
        let waiting = &mut ranks[0];
        thread::scope(|scope| {
            let waiter = scope.spawn(move || (receive(waiting, 100), Instant::now()));
            thread::sleep(Duration::from_millis(50));
            let start = Instant::now();
            handle.abort();
            let (result, end) = waiter.join().unwrap();
            assert_eq!(result, Err(CommError::Aborted));
            assert!(end - start < Duration::from_millis(100), "{:?}", end - start);
        });
        assert_eq!(receive(&mut ranks[0], 1), Err(CommError::Aborted));
        // What was sent before the abort may still make one collective whole.
        let _ = receive(&mut ranks[1], 100);
        assert!(matches!(receive(&mut ranks[1], 100), Err(CommError::PeerLost { rank: 0, .. })));
    }
}

#[test]
fn a_rank_that_goes_away_is_named() {
    let mut ranks = group(3, OPTIONS);
    drop(ranks.remove(1));
    for rank in &mut ranks {
        assert!(matches!(receive(rank, 10), Err(CommError::PeerLost { .. })));
    }
}

#[test]
fn silence_has_an_end() {
    let mut ranks = group(2, TcpOptions { timeout: Duration::from_millis(150), spin: false });
    assert_eq!(receive(&mut ranks[0], 10), Err(CommError::Timeout { rank: 1, seconds: 0 }));
}

#[test]
fn ranks_that_do_different_things_are_found_out() {
    let mut ranks = group(2, OPTIONS);
    let results = on_all(&mut ranks, |rank| receive(rank, 10 + rank.rank()));
    let diverged = |result: &Result<(), CommError>| matches!(result, Err(CommError::Diverged { .. }));
    assert!(results.iter().any(diverged), "{results:?}");
    assert!(results.iter().all(Result::is_err), "{results:?}");
}
