//! The result of a benchmark of the engine, as JSON and as a table.

use std::time::Duration;

use serde::Serialize;
use tandem_engine::{Limits, StepTimes};

use super::statistics::Summary;

/// Everything that one run measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) model: String,
    pub(super) weights: String,
    pub(super) backend: &'static str,
    pub(super) isa: &'static str,
    pub(super) threads: usize,
    pub(super) activations: &'static str,
    /// None where they were not measured; then there are no shares either.
    pub(super) limits: Option<LimitsReport>,
    /// The limit of the activations' type.
    pub(super) peak_operations_per_second: Option<f64>,
    pub(super) results: Vec<Row>,
}

/// What the machine can do at most.
#[derive(Debug, Clone, Serialize)]
pub(super) struct LimitsReport {
    pub(super) read_gb_per_s: f64,
    f32_tflops: f64,
    bf16_tflops: f64,
    int8_tops: f64,
}

/// One concurrency.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) concurrency: usize,
    pub(super) prompt_tokens: usize,
    pub(super) output_tokens: usize,
    pub(super) prefill_tokens_per_second: f64,
    pub(super) decode_tokens_per_second: f64,
    pub(super) ttft_ms: Summary,
    pub(super) tpot_ms: Summary,
    pub(super) prefill_share_of_limit: Option<f64>,
    pub(super) decode_share_of_limit: Option<f64>,
    pub(super) prefill_work: Work,
    pub(super) decode_work: Work,
    pub(super) overhead: Overhead,
}

/// Parts of the time of decode steps that are not the model's, as shares of the whole; 0 where nothing was measured.
#[derive(Debug, Default, Serialize)]
pub(super) struct Overhead {
    scheduling: f64,
    sampling: f64,
    emitting: f64,
    total: f64,
    us_per_step: f64,
    /// Share of the steps that were planned while a device computed the one before; the time for it is the model's.
    overlapped_steps: f64,
}

impl From<&StepTimes> for Overhead {
    fn from(times: &StepTimes) -> Self {
        let share = |part: Duration| {
            if times.steps == 0 { 0.0 } else { part.as_secs_f64() / times.total().as_secs_f64() }
        };
        let outside = times.total() - times.forward;
        Self {
            scheduling: share(times.scheduling),
            sampling: share(times.sampling),
            emitting: share(times.emitting),
            total: share(outside),
            us_per_step: outside.as_secs_f64() * 1e6 / times.steps.max(1) as f64,
            overlapped_steps: times.overlapped as f64 / times.steps.max(1) as f64,
        }
    }
}

/// What was done a second, by the count that the shares are of.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Work {
    pub(super) operations_per_second: f64,
    pub(super) bytes_per_second: f64,
}

impl From<&Limits> for LimitsReport {
    fn from(limits: &Limits) -> Self {
        Self {
            read_gb_per_s: limits.read_gb_per_s,
            f32_tflops: limits.f32_tflops,
            bf16_tflops: limits.bf16_tflops,
            int8_tops: limits.int8_tops,
        }
    }
}

impl LimitsReport {
    fn text(&self) -> String {
        let Self { read_gb_per_s, f32_tflops, bf16_tflops, int8_tops } = *self;
        let rates =
            [("f32", f32_tflops, "TFLOP/s"), ("bf16", bf16_tflops, "TFLOP/s"), ("int8", int8_tops, "TOP/s")];
        // What a GPU's backend does not use is not measured.
        let measured = rates.iter().filter(|(_, rate, _)| *rate > 0.0);
        let rates: String = measured.map(|(name, rate, unit)| format!(", {name} {rate:.2} {unit}")).collect();
        format!("read {read_gb_per_s:.1} GB/s{rates}")
    }
}

impl Report {
    /// One JSON object and a newline.
    pub(super) fn json(&self) -> String {
        // Plain numbers and strings always have a JSON form.
        let json = serde_json::to_string_pretty(self).unwrap_or_default();
        format!("{json}\n")
    }

    /// A table.
    pub(super) fn text(&self) -> String {
        let Self { model, weights, backend, isa, threads, .. } = self;
        let limits = self.limits.as_ref().map_or("not measured".to_owned(), LimitsReport::text);
        let mut out = format!(
            "{model} {weights}, {backend} {isa}, {threads} threads\n\
             limits: {limits}\n\n\
             {:>4} {:>7} {:>7} {:>14} {:>8} {:>14} {:>8} {:>20} {:>20} {:>9}\n",
            "conc",
            "prompt",
            "output",
            "prefill tok/s",
            "of limit",
            "decode tok/s",
            "of limit",
            "TTFT ms 50/95/99",
            "TPOT ms 50/95/99",
            "overhead",
        );
        for row in &self.results {
            let three = |p: &Summary, digits: usize| {
                format!("{:.digits$}/{:.digits$}/{:.digits$}", p.p50, p.p95, p.p99)
            };
            out += &format!(
                "{:>4} {:>7} {:>7} {:>14.1} {:>8} {:>14.1} {:>8} {:>20} {:>20} {:>9}\n",
                row.concurrency,
                row.prompt_tokens,
                row.output_tokens,
                row.prefill_tokens_per_second,
                percent(row.prefill_share_of_limit),
                row.decode_tokens_per_second,
                percent(row.decode_share_of_limit),
                three(&row.ttft_ms, 0),
                three(&row.tpot_ms, 2),
                percent(Some(row.overhead.total)),
            );
        }
        out
    }

    /// A share above 1 means that a limit or a speed was measured wrongly.
    pub(super) fn check(&self) -> Result<(), String> {
        let shares = self.results.iter().flat_map(|row| {
            [("prefill", row.prefill_share_of_limit), ("decode", row.decode_share_of_limit)]
                .map(|(what, share)| (row.concurrency, what, share))
        });
        for (concurrency, what, share) in shares {
            if let Some(share) = share
                && !(0.0..=1.0).contains(&share)
            {
                return Err(format!(
                    "{what} at concurrency {concurrency} reached {share:.2} of a limit: the limit was measured on a busy \
                     machine, or the model is so small that it is read from the caches"
                ));
            }
        }
        Ok(())
    }
}

fn percent(share: Option<f64>) -> String {
    share.map_or("–".to_owned(), |share| format!("{:.1} %", share * 100.0))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn work(operations_per_second: f64, bytes_per_second: f64) -> Work {
        Work { operations_per_second, bytes_per_second }
    }

    /// A report with one row, whose prefill has this share.
    pub(in super::super) fn report(share: f64) -> Report {
        let limits = LimitsReport { read_gb_per_s: 80.0, f32_tflops: 0.5, bf16_tflops: 1.0, int8_tops: 2.0 };
        let row = Row {
            concurrency: 1,
            prompt_tokens: 512,
            output_tokens: 128,
            prefill_tokens_per_second: 1.0,
            decode_tokens_per_second: 2.0,
            ttft_ms: Summary { p50: 50.0, ..Summary::default() },
            tpot_ms: Summary::default(),
            prefill_share_of_limit: Some(share),
            decode_share_of_limit: Some(0.5),
            prefill_work: work(0.4e12, 0.1e9),
            decode_work: work(0.02e12, 40e9),
            overhead: Overhead::default(),
        };
        let (model, weights) = ("m".to_owned(), "Q4_1".to_owned());
        Report {
            model,
            weights,
            backend: "cpu",
            isa: "scalar",
            threads: 2,
            activations: "int8",
            limits: Some(limits),
            peak_operations_per_second: Some(2e12),
            results: vec![row],
        }
    }

    #[test]
    fn the_json_has_the_documented_keys() {
        let json: serde_json::Value = serde_json::from_str(&report(0.5).json()).unwrap();
        let keys = |value: &serde_json::Value| {
            value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            keys(&json),
            "model weights backend isa threads activations limits peak_operations_per_second results"
        );
        assert_eq!(keys(&json["limits"]), "read_gb_per_s f32_tflops bf16_tflops int8_tops");
        assert_eq!(
            keys(&json["results"][0]),
            "concurrency prompt_tokens output_tokens prefill_tokens_per_second decode_tokens_per_second ttft_ms tpot_ms \
             prefill_share_of_limit decode_share_of_limit prefill_work decode_work overhead"
        );
        assert_eq!(
            keys(&json["results"][0]["overhead"]),
            "scheduling sampling emitting total us_per_step overlapped_steps"
        );
        assert_eq!(
            json["results"][0]["ttft_ms"],
            serde_json::json!({ "mean": 0.0, "p50": 50.0, "p90": 0.0, "p95": 0.0, "p99": 0.0 })
        );
    }

    #[test]
    fn overhead_is_all_but_the_model() {
        let us = Duration::from_micros;
        let (scheduling, forward, sampling, emitting) = (us(10), us(150), us(30), us(10));
        let times = StepTimes { steps: 2, overlapped: 1, scheduling, forward, sampling, emitting };
        let Overhead { scheduling, sampling, emitting, total, us_per_step, overlapped_steps } =
            Overhead::from(&times);
        assert_eq!([scheduling, sampling, emitting, total, us_per_step], [0.05, 0.15, 0.05, 0.25, 25.0]);
        assert_eq!(overlapped_steps, 0.5);
        assert_eq!(Overhead::from(&StepTimes::default()).total, 0.0);
    }

    #[test]
    fn more_than_the_limit_is_an_error() {
        assert!(report(1.0).check().is_ok());
        assert!(report(1.01).check().is_err());
        assert!(report(f64::NAN).check().is_err());
        assert!(report(0.5).text().contains("50.0 %"));
        let mut unmeasured = report(0.5);
        unmeasured.limits = None;
        unmeasured.results[0].prefill_share_of_limit = None;
        assert!(unmeasured.check().is_ok() && unmeasured.text().contains("limits: not measured"));
    }
}
