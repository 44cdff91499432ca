//! What is drawn of a report.

use super::chart::{Axis, Chart, Line, Point, Scale, Series, page, round_down, round_up};
use super::local_report::Report as EngineReport;
use super::remote_report::Report as ServerReport;
use super::statistics::Summary;

/// Roofline, rates and times of the engine.
pub(super) fn of_engine(report: &EngineReport) -> String {
    let EngineReport { model, weights, backend, isa, threads, activations, results, .. } = report;
    let sizes = results.first().map_or(String::new(), |row| {
        format!(", {} prompt and {} output tokens", row.prompt_tokens, row.output_tokens)
    });
    let title = format!("{model}, {weights}");
    let details = format!("{backend} {isa}, {threads} threads, {activations} activations{sizes}");
    let by_concurrency = |value: &dyn Fn(usize) -> f64| -> Vec<Point> {
        results.iter().enumerate().map(|(i, row)| point(row.concurrency as f64, value(i))).collect()
    };
    let concurrency: Vec<usize> = results.iter().map(|row| row.concurrency).collect();
    let rates = Chart {
        title: "Throughput".to_owned(),
        x: concurrency_axis(&concurrency),
        y: linear("tokens/s"),
        series: vec![
            joined("prefill", 0, Line::Solid, by_concurrency(&|i| results[i].prefill_tokens_per_second)),
            joined("decode", 1, Line::Solid, by_concurrency(&|i| results[i].decode_tokens_per_second)),
        ],
    };
    let times: Vec<(Summary, Summary)> = results.iter().map(|row| (row.ttft_ms, row.tpot_ms)).collect();
    let charts: Vec<Chart> =
        roofline(report).into_iter().chain([rates, latency(&concurrency, &times)]).collect();
    page(&title, &details, &charts)
}

/// Rates and times of a server.
pub(super) fn of_server(report: &ServerReport) -> String {
    let ServerReport { url, model, results, .. } = report;
    let sizes = results.first().map_or(String::new(), |row| {
        let complete = (row.num_requests - row.num_errors).max(1);
        let (prompt, output) = (row.total_prompt_tokens / complete, row.total_output_tokens / complete);
        format!("{prompt} prompt and {output} output tokens")
    });
    let concurrency: Vec<usize> = results.iter().map(|row| row.concurrency).collect();
    let rate = |value: &dyn Fn(usize) -> f64| -> Vec<Point> {
        results.iter().enumerate().map(|(i, row)| point(row.concurrency as f64, value(i))).collect()
    };
    let rates = Chart {
        title: "Throughput".to_owned(),
        x: concurrency_axis(&concurrency),
        y: linear("tokens/s"),
        series: vec![
            joined("prompt tokens", 0, Line::Solid, rate(&|i| results[i].prompt_tokens_per_second)),
            joined("output tokens", 1, Line::Solid, rate(&|i| results[i].output_tokens_per_second)),
        ],
    };
    let times: Vec<(Summary, Summary)> = results.iter().map(|row| (row.ttft_ms, row.tpot_ms)).collect();
    page(&format!("{model} at {url}"), &sizes, &[rates, latency(&concurrency, &times)])
}

/// Operations a second over operations per byte, below the two limits, if those were measured.
fn roofline(report: &EngineReport) -> Option<Chart> {
    let bytes_per_second = report.limits.as_ref()?.read_gb_per_s * 1e9;
    let peak = report.peak_operations_per_second?;
    let dots = |name: &str, colour, work: &dyn Fn(usize) -> (f64, f64)| {
        let points = report.results.iter().enumerate().map(|(i, row)| {
            let (operations, bytes) = work(i);
            Point { label: format!("{} at once", row.concurrency), ..point(operations / bytes, operations) }
        });
        let points = points.filter(|p| p.x.is_finite() && p.x > 0.0).collect();
        Series { name: name.to_owned(), colour, line: Line::None, markers: true, points }
    };
    let prefill = dots("prefill", 0, &|i| {
        let work = &report.results[i].prefill_work;
        (work.operations_per_second, work.bytes_per_second)
    });
    let decode = dots("decode", 1, &|i| {
        let work = &report.results[i].decode_work;
        (work.operations_per_second, work.bytes_per_second)
    });
    // The limits go as far as the dots and past the knee where they meet.
    let knee = peak / bytes_per_second;
    let dots = || prefill.points.iter().chain(&decode.points).map(|p| p.x);
    let left = round_down(dots().fold(knee, f64::min) / 1.5);
    let right = round_up(dots().fold(knee, f64::max) * 1.5);
    let memory = vec![point(left, left * bytes_per_second), point(knee, peak)];
    let arithmetic = vec![point(knee, peak), point(right, peak)];
    let limit = |name: String, colour, line, points| Series { name, colour, line, markers: false, points };
    Some(Chart {
        title: "Roofline: linear layers against what was measured of this machine".to_owned(),
        x: Axis { label: "operations per byte".to_owned(), scale: Scale::Log, ticks: Vec::new() },
        y: Axis { label: "operations/s".to_owned(), scale: Scale::Log, ticks: Vec::new() },
        series: vec![
            limit(format!("read bandwidth, {:.1} GB/s", bytes_per_second / 1e9), 2, Line::Solid, memory),
            limit(
                format!(
                    "arithmetic peak, {} activations, {:.2} T operations/s",
                    report.activations,
                    peak / 1e12
                ),
                4,
                Line::Solid,
                arithmetic,
            ),
            prefill,
            decode,
        ],
    })
}

/// TTFT and TPOT over concurrency, medians and 99th percentiles.
fn latency(concurrency: &[usize], times: &[(Summary, Summary)]) -> Chart {
    let points = |value: &dyn Fn(&(Summary, Summary)) -> f64| -> Vec<Point> {
        concurrency.iter().zip(times).map(|(&c, times)| point(c as f64, value(times))).collect()
    };
    Chart {
        title: "Latency".to_owned(),
        x: concurrency_axis(concurrency),
        y: Axis { label: "milliseconds".to_owned(), scale: Scale::Log, ticks: Vec::new() },
        series: vec![
            joined("TTFT, median", 0, Line::Solid, points(&|(ttft, _)| ttft.p50)),
            joined("TTFT, 99th percentile", 0, Line::Dashed, points(&|(ttft, _)| ttft.p99)),
            joined("TPOT, median", 1, Line::Solid, points(&|(_, tpot)| tpot.p50)),
            joined("TPOT, 99th percentile", 1, Line::Dashed, points(&|(_, tpot)| tpot.p99)),
        ],
    }
}

fn point(x: f64, y: f64) -> Point {
    Point { x, y, label: String::new() }
}

fn joined(name: &str, colour: usize, line: Line, mut points: Vec<Point>) -> Series {
    points.sort_by(|a, b| a.x.total_cmp(&b.x));
    Series { name: name.to_owned(), colour, line, markers: true, points }
}

fn linear(label: &str) -> Axis {
    Axis { label: label.to_owned(), scale: Scale::Linear, ticks: Vec::new() }
}

fn concurrency_axis(concurrency: &[usize]) -> Axis {
    let mut ticks: Vec<f64> = concurrency.iter().map(|&c| c as f64).collect();
    ticks.sort_by(f64::total_cmp);
    ticks.dedup();
    Axis { label: "requests at once".to_owned(), scale: Scale::Log, ticks }
}

#[cfg(test)]
mod tests {
    use super::super::chart::tests::assert_well_formed;
    use super::super::{local_report, remote_report};
    use super::*;

    #[test]
    fn an_engines_plot_has_limits_and_a_dot_for_each_measurement() {
        let report = local_report::tests::report(0.5);
        let svg = of_engine(&report);
        assert_well_formed(&svg);
        for text in ["read bandwidth, 80.0 GB/s", "2.00 T operations/s", "Throughput", "Latency"] {
            assert!(svg.contains(text), "{text}");
        }
        let roofline = roofline(&report).unwrap();
        assert_eq!(
            roofline.series.iter().map(|series| series.points.len()).collect::<Vec<_>>(),
            [2, 2, 1, 1]
        );
        // 80 GB/s and 2 T operations/s meet at 25 operations per byte.
        let knee = &roofline.series[1].points[0];
        assert_eq!((knee.x, knee.y), (25.0, 2e12));
    }

    #[test]
    fn a_servers_plot_orders_by_concurrency() {
        let report = remote_report::tests::report(&[16, 1, 4], &[]);
        assert_well_formed(&of_server(&report));
        let axis = concurrency_axis(&[16, 1, 4, 4]);
        assert_eq!(axis.ticks, [1.0, 4.0, 16.0]);
        // Nothing was complete: an empty plot is a plot.
        assert_well_formed(&of_server(&remote_report::tests::report(&[1], &[("timeout", 10)])));
    }
}
