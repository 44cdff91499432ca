//! The computing thread over a device that does what a test says.

use std::net::TcpListener;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar};
use std::thread;

use tandem_wire::Incarnation;

use super::*;
use crate::sample_row::SampleRow;
use crate::step_plan::StepPlan;

const DEADLINE: Duration = Duration::from_secs(20);

/// What the device was told and what it shall say.
#[derive(Default)]
struct Script {
    /// Steps that were begun and are not over.
    begun: VecDeque<u64>,
    all_begun: Vec<u64>,
    poisoned: usize,
    /// How many steps may end.
    ends: usize,
    /// What ends fails.
    fails: bool,
    given_up: bool,
}

#[derive(Clone, Default)]
struct Device {
    script: Arc<(Mutex<Script>, Condvar)>,
    beside: bool,
}

impl Device {
    fn change<T>(&self, change: impl FnOnce(&mut Script) -> T) -> T {
        let result = change(&mut self.script.0.lock().unwrap());
        self.script.1.notify_all();
        result
    }

    fn wait_until(&self, holds: impl Fn(&Script) -> bool) {
        let guard = self.script.0.lock().unwrap();
        let (guard, waited) =
            self.script.1.wait_timeout_while(guard, DEADLINE, |script| !holds(script)).unwrap();
        assert!(!waited.timed_out(), "begun: {:?} of {:?}", guard.begun, guard.all_begun);
    }
}

impl ShardDevice for Device {
    fn form(&mut self, forming: Forming<'_>) -> Result<(), ShardError> {
        self.change(|script| *script = Script { all_begun: script.all_begun.clone(), ..Script::default() });
        let device = self.clone();
        assert!(
            forming.aborts.watch(forming.epoch, move || device.change(|script| script.given_up = true)),
            "nobody gave this up"
        );
        Ok(())
    }

    fn begin(&mut self, batch: &ForwardBatch, _: &[SampleRow<'_>]) -> Result<(), ShardError> {
        // The plans below say in their tokens which step they are.
        let step = u64::from(batch.token_ids[0]);
        self.change(|script| {
            script.begun.push_back(step);
            script.all_begun.push(step);
            assert!(script.begun.len() <= if self.beside { MAX_BEGUN } else { 1 }, "{:?}", script.begun);
        });
        Ok(())
    }

    fn poll(&mut self) -> Result<Option<ShardOutput>, ShardError> {
        self.change(|script| {
            if script.given_up || (script.ends > 0 && script.fails) {
                script.begun.clear();
                return Err(ShardError::Failed("told to".into()));
            }
            if script.ends == 0 {
                return Ok(None);
            }
            script.ends -= 1;
            script.begun.pop_front().expect("a step was begun");
            Ok(Some(ShardOutput { forward: Duration::ZERO, rows: Vec::new() }))
        })
    }

    fn computes_beside(&self) -> bool {
        self.beside
    }

    fn kept_tokens(&self) -> usize {
        1
    }

    fn fill_nan(&mut self, blocks: &[u32]) {
        self.change(|script| script.poisoned += blocks.len());
    }

    fn vocab_size(&self) -> usize {
        100
    }
}

/// A rank that is a group by itself.
struct Rank {
    device: Device,
    incarnation: Incarnation,
    jobs: Sender<(u64, Job)>,
    ended: mpsc::Receiver<(u64, Done)>,
    aborts: Arc<Aborts>,
}

impl Rank {
    fn start(beside: bool) -> Self {
        let device = Device { beside, ..Device::default() };
        let (jobs, work) = mpsc::channel();
        let (done, ended) = mpsc::channel();
        let aborts = Arc::new(Aborts::default());
        let incarnation = Incarnation(7);
        let (shard, given_up) = (device.clone(), aborts.clone());
        thread::spawn(move || {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let mesh = Mesh::start(0, incarnation, listener, None).unwrap();
            let compute = Compute {
                rank: 0,
                size: 1,
                device: Box::new(shard),
                max_tokens: 16,
                max_logits_rows: 16,
                spin: false,
                mesh: &mesh,
                aborts: &given_up,
            };
            compute.run(&work, |epoch, outcome| done.send((epoch, outcome)).unwrap());
        });
        let rank = Self { device, incarnation, jobs, ended, aborts };
        rank.form(1);
        rank
    }

    fn form(&self, epoch: u64) {
        let members = vec![MemberAddress { address: "127.0.0.1:1".into(), incarnation: self.incarnation }];
        self.jobs.send((epoch, Job::Form { num_blocks: 4, members })).unwrap();
        assert_eq!(self.next(), (epoch, Done::Formed(Ok(()))));
    }

    fn step(&self, epoch: u64, number: u64) {
        self.send(epoch, number, None);
    }

    fn send(&self, epoch: u64, number: u64, pending_row: Option<u32>) {
        let sequence = PlannedSequence {
            token_ids: vec![number as u32],
            pending_row,
            block_table: vec![0],
            logits_rows: vec![0],
            ..PlannedSequence::default()
        };
        let plan =
            StepPlan { step: number, block_size: 16, sequences: vec![sequence], block_copies: Vec::new() };
        let step = Step { digest: plan.digest(), plan, rows: Vec::new() };
        self.jobs.send((epoch, Job::Step(Box::new(step)))).unwrap();
    }

    fn next(&self) -> (u64, Done) {
        self.ended.recv_timeout(DEADLINE).expect("a job ends")
    }

    /// The number of the step that is over next.
    fn next_step(&self) -> u64 {
        match self.next() {
            (1, Done::Stepped { step, result: Ok(answer) }) if answer.step == step => step,
            other => panic!("{other:?}"),
        }
    }

    fn let_end(&self, steps: usize) {
        self.device.change(|script| script.ends += steps);
    }
}

#[test]
fn two_steps_are_begun_and_end_in_their_order() {
    let rank = Rank::start(true);
    (1..=4).for_each(|number| rank.step(1, number));
    rank.device.wait_until(|script| script.begun == [1, 2]);
    rank.let_end(1);
    assert_eq!(rank.next_step(), 1);
    rank.device.wait_until(|script| script.begun == [2, 3]);
    rank.let_end(3);
    assert_eq!([rank.next_step(), rank.next_step(), rank.next_step()], [2, 3, 4]);
    assert!(rank.ended.try_recv().is_err(), "each job ends once");
}

#[test]
fn a_device_that_waits_for_each_step_is_given_one_at_a_time() {
    let rank = Rank::start(false);
    (1..=3).for_each(|number| rank.step(1, number));
    for number in 1..=3 {
        rank.device.wait_until(|script| script.begun == [number]);
        rank.let_end(1);
        assert_eq!(rank.next_step(), number);
    }
}

#[test]
fn blocks_are_overwritten_behind_the_steps_that_were_begun() {
    let rank = Rank::start(true);
    rank.step(1, 1);
    rank.jobs.send((1, Job::Poison(vec![0, 1]))).unwrap();
    rank.device.wait_until(|script| script.poisoned == 2 && script.begun == [1]);
    assert_eq!(rank.next(), (1, Done::Poisoned));
    rank.let_end(1);
    assert_eq!(rank.next_step(), 1);
}

#[test]
fn after_a_step_that_failed_nothing_of_its_epoch_is_computed() {
    let rank = Rank::start(true);
    (1..=2).for_each(|number| rank.step(1, number));
    rank.device.wait_until(|script| script.begun == [1, 2]);
    rank.device.change(|script| (script.ends, script.fails) = (1, true));
    assert_eq!(rank.next(), (1, Done::Stepped { step: 1, result: Err("told to".into()) }));
    assert_eq!(rank.next(), (1, Done::Aborted));
    // The leader may not know yet.
    rank.step(1, 3);
    assert_eq!(rank.next(), (1, Done::Aborted));
    rank.aborts.abort(1);
    rank.form(2);
    rank.step(2, 4);
    rank.let_end(1);
    assert!(matches!(rank.next(), (2, Done::Stepped { step: 4, result: Ok(_) })));
    rank.device.change(|script| assert_eq!(script.all_begun, [1, 2, 4]));
}

#[test]
fn an_epoch_that_is_given_up_ends_both_steps() {
    let rank = Rank::start(true);
    (1..=3).for_each(|number| rank.step(1, number));
    rank.device.wait_until(|script| script.begun == [1, 2]);
    rank.aborts.abort(1);
    (0..3).for_each(|_| assert_eq!(rank.next(), (1, Done::Aborted)));
    rank.form(2);
}

#[test]
fn tokens_that_the_step_before_did_not_leave_are_refused() {
    let rank = Rank::start(true);
    rank.step(1, 1);
    rank.send(1, 2, Some(0));
    rank.device.wait_until(|script| script.begun == [1, 2]);
    rank.let_end(2);
    assert_eq!([rank.next_step(), rank.next_step()], [1, 2]);
    rank.send(1, 3, Some(1));
    match rank.next() {
        (1, Done::Stepped { step: 3, result: Err(reason) }) => assert!(reason.contains("does not fit")),
        other => panic!("{other:?}"),
    }
}
