//! The result of a benchmark of a server, as JSON and as a table.

use std::collections::BTreeMap;

use serde::Serialize;

use super::statistics::Summary;

/// Everything that one run measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) url: String,
    pub(super) endpoint: &'static str,
    pub(super) model: String,
    /// What prompts were made of.
    pub(super) prompts: &'static str,
    pub(super) seed: u64,
    pub(super) results: Vec<Row>,
    /// What the first failed request said.
    pub(super) first_failure: Option<String>,
}

/// One concurrency. Tokens are those of complete answers.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) concurrency: usize,
    pub(super) num_requests: usize,
    pub(super) num_errors: usize,
    /// Failed requests by kind.
    pub(super) errors: BTreeMap<String, usize>,
    pub(super) total_prompt_tokens: usize,
    /// Prompt tokens that the server did not compute.
    pub(super) total_cached_tokens: usize,
    pub(super) total_output_tokens: usize,
    pub(super) wall_seconds: f64,
    pub(super) output_tokens_per_second: f64,
    pub(super) prompt_tokens_per_second: f64,
    pub(super) ttft_ms: Summary,
    pub(super) tpot_ms: Summary,
}

impl Row {
    /// Tokens of a complete answer's prompt and output, on average.
    fn tokens_per_request(&self) -> (f64, f64) {
        let complete = (self.num_requests - self.num_errors).max(1) as f64;
        (self.total_prompt_tokens as f64 / complete, self.total_output_tokens as f64 / complete)
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
        let Self { url, endpoint, model, prompts, seed, .. } = self;
        let mut out = format!(
            "{url}{endpoint}, model {model}, prompts of random {prompts}, seed {seed}\n\n\
             {:>4} {:>8} {:>6} {:>7} {:>7} {:>12} {:>12} {:>25} {:>25} {:>8}\n",
            "conc",
            "requests",
            "errors",
            "prompt",
            "output",
            "output tok/s",
            "prompt tok/s",
            "TTFT ms mean/50/90/99",
            "TPOT ms mean/50/90/99",
            "wall s",
        );
        for row in &self.results {
            let four = |s: &Summary, digits: usize| {
                format!("{:.digits$}/{:.digits$}/{:.digits$}/{:.digits$}", s.mean, s.p50, s.p90, s.p99)
            };
            let (prompt, output) = row.tokens_per_request();
            out += &format!(
                "{:>4} {:>8} {:>6} {:>7.0} {:>7.0} {:>12.1} {:>12.1} {:>25} {:>25} {:>8.2}\n",
                row.concurrency,
                row.num_requests,
                row.num_errors,
                prompt,
                output,
                row.output_tokens_per_second,
                row.prompt_tokens_per_second,
                four(&row.ttft_ms, 0),
                four(&row.tpot_ms, 2),
                row.wall_seconds,
            );
        }
        let cached: usize = self.results.iter().map(|row| row.total_cached_tokens).sum();
        if cached > 0 {
            out += &format!("\n{cached} prompt tokens came from the server's prefix cache\n");
        }
        out
    }

    /// A run in which requests failed is no measurement.
    pub(super) fn check(&self) -> Result<(), String> {
        let mut errors: BTreeMap<&str, usize> = BTreeMap::new();
        for (kind, count) in self.results.iter().flat_map(|row| &row.errors) {
            *errors.entry(kind).or_default() += count;
        }
        if errors.is_empty() {
            return Ok(());
        }
        let total: usize = self.results.iter().map(|row| row.num_requests).sum();
        let failed: usize = errors.values().sum();
        let kinds: Vec<String> = errors.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        let first = self.first_failure.as_deref().unwrap_or_default();
        Err(format!("{failed} of {total} requests failed ({}); the first: {first}", kinds.join(", ")))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A report with one row for each concurrency.
    pub(in super::super) fn report(concurrency: &[usize], errors: &[(&str, usize)]) -> Report {
        let row = |&concurrency: &usize| Row {
            concurrency,
            num_requests: 10,
            num_errors: errors.iter().map(|(_, count)| count).sum(),
            errors: errors.iter().map(|&(kind, count)| (kind.to_owned(), count)).collect(),
            total_prompt_tokens: 80,
            total_cached_tokens: 0,
            total_output_tokens: 40,
            wall_seconds: 2.0,
            output_tokens_per_second: 20.0 * concurrency as f64,
            prompt_tokens_per_second: 40.0 * concurrency as f64,
            ttft_ms: Summary { mean: 3.0, p50: 2.0, p90: 4.0, p95: 5.0, p99: 6.0 },
            tpot_ms: Summary { mean: 1.0, p50: 1.0, p90: 1.0, p95: 1.0, p99: 2.0 },
        };
        Report {
            url: "http://localhost:8000".to_owned(),
            endpoint: "/v1/completions",
            model: "m".to_owned(),
            prompts: "token ids",
            seed: 0,
            results: concurrency.iter().map(row).collect(),
            first_failure: errors.first().map(|_| "status 503: full".to_owned()),
        }
    }

    #[test]
    fn failed_requests_fail_the_run() {
        assert!(report(&[1, 2], &[]).check().is_ok());
        let failed = report(&[1, 2], &[("status_503", 2), ("timeout", 1)]);
        let message = failed.check().unwrap_err();
        assert_eq!(message, "6 of 20 requests failed (status_503 4, timeout 2); the first: status 503: full");
        assert!(failed.text().contains("3/2/4/6"), "{}", failed.text());
    }

    #[test]
    fn the_json_has_the_documented_keys() {
        let json: serde_json::Value = serde_json::from_str(&report(&[1], &[("timeout", 1)]).json()).unwrap();
        let keys = json["results"][0].as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
        assert_eq!(
            keys,
            "concurrency num_requests num_errors errors total_prompt_tokens total_cached_tokens total_output_tokens \
             wall_seconds output_tokens_per_second prompt_tokens_per_second ttft_ms tpot_ms"
        );
        assert_eq!(json["results"][0]["errors"], serde_json::json!({ "timeout": 1 }));
    }
}
