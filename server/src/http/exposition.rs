//! Prometheus' text format: families with HELP and TYPE, samples with escaped labels.

use std::fmt::{Display, Write};

use tandem_engine::Histogram;

/// A page of metrics being written. Each family is written once, whole.
#[derive(Debug)]
pub(super) struct Exposition {
    text: String,
    /// Labels that every sample carries, written out: `model_name="x",engine="0"`.
    common: String,
}

/// The types that are used here.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    Counter,
    Gauge,
}

impl Exposition {
    /// `common`: labels of every sample.
    pub(super) fn new(common: &[(&str, &str)]) -> Self {
        Self { text: String::with_capacity(32 * 1024), common: write_labels(common) }
    }

    /// Goes on with other common labels.
    pub(super) fn set_common(&mut self, common: &[(&str, &str)]) {
        self.common = write_labels(common);
    }

    /// A family with one sample.
    pub(super) fn one(&mut self, kind: Kind, name: &str, help: &str, value: impl Into<Number>) {
        self.many(kind, name, help, &[(&[], value.into())]);
    }

    /// A family with one sample per set of labels.
    pub(super) fn many(&mut self, kind: Kind, name: &str, help: &str, samples: &[(&[(&str, &str)], Number)]) {
        let kind = if kind == Kind::Counter { "counter" } else { "gauge" };
        self.head(name, kind, help);
        for (labels, value) in samples {
            self.sample(name, &write_labels(labels), value);
        }
    }

    /// A histogram; buckets are written cumulative, as the format wants them.
    pub(super) fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head(name, "histogram", help);
        let bucket = format!("{name}_bucket");
        let mut cumulative = 0;
        for (bound, count) in histogram.bounds.iter().zip(&histogram.counts) {
            cumulative += count;
            self.sample(&bucket, &format!("le=\"{}\"", Number(*bound)), cumulative);
        }
        let count = histogram.count();
        self.sample(&bucket, "le=\"+Inf\"", count);
        self.sample(&format!("{name}_sum"), "", Number(histogram.sum));
        self.sample(&format!("{name}_count"), "", count);
    }

    pub(super) fn finish(self) -> String {
        self.text
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: impl Display) {
        let comma = if labels.is_empty() || self.common.is_empty() { "" } else { "," };
        let _ = writeln!(self.text, "{name}{{{}{comma}{labels}}} {value}", self.common);
    }
}

/// A sample's value. Counters of integers stay exact up to 2^53.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Number(f64);

impl From<f64> for Number {
    fn from(value: f64) -> Self {
        Self(value)
    }
}

impl From<u64> for Number {
    fn from(value: u64) -> Self {
        Self(value as f64)
    }
}

impl Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            f64::INFINITY => f.write_str("+Inf"),
            f64::NEG_INFINITY => f.write_str("-Inf"),
            value => value.fmt(f),
        }
    }
}

fn write_labels(labels: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (name, value) in labels {
        let comma = if text.is_empty() { "" } else { "," };
        let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let _ = write!(text, "{comma}{name}=\"{value}\"");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_are_cumulative_and_labels_escaped() {
        let histogram = Histogram { bounds: &[0.5, 2560.0], counts: vec![1, 2, 3], sum: 7.25 };
        let mut page = Exposition::new(&[("model_name", "a\"b\\c\nd")]);
        page.histogram("x_seconds", "Help.", &histogram);
        page.many(
            Kind::Gauge,
            "y",
            "Help.",
            &[(&[("state", "free")], 3u64.into()), (&[], f64::INFINITY.into())],
        );
        let expected = r#"# HELP x_seconds Help.
# TYPE x_seconds histogram
x_seconds_bucket{model_name="a\"b\\c\nd",le="0.5"} 1
x_seconds_bucket{model_name="a\"b\\c\nd",le="2560"} 3
x_seconds_bucket{model_name="a\"b\\c\nd",le="+Inf"} 6
x_seconds_sum{model_name="a\"b\\c\nd"} 7.25
x_seconds_count{model_name="a\"b\\c\nd"} 6
# HELP y Help.
# TYPE y gauge
y{model_name="a\"b\\c\nd",state="free"} 3
y{model_name="a\"b\\c\nd"} +Inf
"#;
        assert_eq!(page.finish(), expected);
    }
}
