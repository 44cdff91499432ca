//! Utilization and memory of the GPUs that the model is on, for `/metrics`.
//!
//! NVML answers in microseconds, but a driver in trouble may hold whoever asks for seconds. So it is asked on a blocking thread of
//! the runtime, one question at a time and at most one a second, and a page waits for the answer only briefly: what it shows then
//! is the answer before, and nothing when that is old.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tandem_engine::{GpuMeter, GpuUsage};

use super::exposition::{Exposition, Kind, Number};

/// Shortest time between two questions.
const MIN_SPAN: Duration = Duration::from_secs(1);
/// How long a page waits for an answer.
const PATIENCE: Duration = Duration::from_millis(20);
/// Older answers are not shown: a dashboard must not take a dead driver's last word for the present.
const STALE: Duration = Duration::from_secs(30);

/// What is known of the GPUs.
#[derive(Debug)]
pub struct GpuGauges {
    meter: Arc<GpuMeter>,
    last: Arc<Mutex<Last>>,
}

#[derive(Debug, Default)]
struct Last {
    asked: Option<Instant>,
    is_asking: bool,
    answer: Option<(Instant, Vec<GpuUsage>)>,
}

impl GpuGauges {
    pub fn new(meter: GpuMeter) -> Self {
        Self { meter: Arc::new(meter), last: Arc::default() }
    }

    /// Asks again if it is time to.
    pub(super) async fn refresh(&self) {
        if !lock(&self.last).begin(Instant::now()) {
            return;
        }
        let (meter, last) = (Arc::clone(&self.meter), Arc::clone(&self.last));
        let question = tokio::task::spawn_blocking(move || {
            // A panic of NVML's must not look like a question that is still open.
            let usage = catch_unwind(AssertUnwindSafe(|| meter.read())).unwrap_or_default();
            lock(&last).end(Instant::now(), usage);
        });
        // One that takes longer ends some time later, by itself.
        let _ = tokio::time::timeout(PATIENCE, question).await;
    }

    pub(super) fn write(&self, page: &mut Exposition) {
        let usage = lock(&self.last).recent(Instant::now());
        let families: [Family; 3] = [
            ("llm_gpu_utilization_ratio", "Share of the last moment in which the GPU computed.", |of| {
                of.utilization_ratio.map(Number::from)
            }),
            ("llm_gpu_memory_used_bytes", "GPU memory in use by all processes.", |of| {
                of.memory_used_bytes.map(Number::from)
            }),
            ("llm_gpu_memory_total_bytes", "GPU memory.", |of| of.memory_total_bytes.map(Number::from)),
        ];
        for (name, help, value) in families {
            let samples: Vec<(String, Number)> =
                usage.iter().filter_map(|of| Some((of.gpu.to_string(), value(of)?))).collect();
            let labels: Vec<[(&str, &str); 1]> =
                samples.iter().map(|(gpu, _)| [("gpu", gpu.as_str())]).collect();
            let samples: Vec<(&[(&str, &str)], Number)> =
                labels.iter().zip(&samples).map(|(label, (_, value))| (label.as_slice(), *value)).collect();
            if !samples.is_empty() {
                page.many(Kind::Gauge, name, help, &samples);
            }
        }
    }
}

/// Name, help, and where the value is.
type Family = (&'static str, &'static str, fn(&GpuUsage) -> Option<Number>);

impl Last {
    /// Whether to ask now; who is told so has to.
    fn begin(&mut self, now: Instant) -> bool {
        let is_time = self.asked.is_none_or(|asked| now.duration_since(asked) >= MIN_SPAN);
        let begins = is_time && !self.is_asking;
        if begins {
            *self = Self { asked: Some(now), is_asking: true, answer: self.answer.take() };
        }
        begins
    }

    fn end(&mut self, now: Instant, usage: Vec<GpuUsage>) {
        self.is_asking = false;
        self.answer = Some((now, usage));
    }

    fn recent(&self, now: Instant) -> Vec<GpuUsage> {
        let recent = self.answer.as_ref().filter(|(at, _)| now.duration_since(*at) < STALE);
        recent.map(|(_, usage)| usage.clone()).unwrap_or_default()
    }
}

fn lock(last: &Mutex<Last>) -> MutexGuard<'_, Last> {
    last.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_question_at_a_time_and_one_a_second() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut last = Last::default();
        assert!(last.begin(at(0)));
        assert!(!last.begin(at(5000)), "the first has no answer yet");
        let usage = GpuUsage {
            gpu: 0,
            utilization_ratio: Some(0.5),
            memory_used_bytes: None,
            memory_total_bytes: None,
        };
        last.end(at(5000), vec![usage]);
        assert!(last.begin(at(5000)), "the question is older than a second");
        last.end(at(5001), vec![usage]);
        assert!(!last.begin(at(5999)));
        assert!(last.begin(at(6000)));
        assert_eq!(last.recent(at(6000)), [usage], "shown until there is a newer one");
        assert!(last.recent(at(5001) + STALE).is_empty());
    }
}
