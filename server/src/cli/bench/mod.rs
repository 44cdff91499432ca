//! `tandem bench`: the speed of an engine in this process beside the machine's limits ([`local`]), or that of any server
//! that speaks OpenAI's API, over HTTP ([`remote`]).

mod chart;
mod client;
mod local;
mod local_report;
mod perplexity;
mod plots;
mod prompts;
mod remote;
mod remote_report;
mod statistics;
mod stream;

use std::path::Path;

use super::{Exit, terminal};
use crate::config::{BenchConfig, BenchTarget, OutputFormat};

/// Runs the command.
pub(super) fn bench(config: BenchConfig) -> Result<(), Exit> {
    let BenchConfig { load, format, plot, target, .. } = config;
    // Refused now rather than when all is measured.
    if let Some(path) = &plot {
        write_plot(path, "")?;
    }
    let result = match target {
        BenchTarget::Engine(common) => {
            let report = local::measure_engine(*common, &load)?;
            Printed {
                json: report.json(),
                text: report.text(),
                plot: plots::of_engine(&report),
                check: report.check(),
            }
        }
        BenchTarget::Server(server) => {
            let report = remote::measure_server(server, &load)?;
            Printed {
                json: report.json(),
                text: report.text(),
                plot: plots::of_server(&report),
                check: report.check(),
            }
        }
        BenchTarget::Perplexity(common, text) => {
            let report = perplexity::perplexity(*common, &text)?;
            Printed { json: report.json(), text: report.text(), plot: String::new(), check: Ok(()) }
        }
    };
    terminal::print(match format {
        OutputFormat::Json => &result.json,
        OutputFormat::Text => &result.text,
    });
    if let Some(path) = &plot {
        write_plot(path, &result.plot)?;
    }
    result.check.map_err(Exit::failed)
}

/// A report in its forms.
struct Printed {
    json: String,
    text: String,
    plot: String,
    /// Why the measurement does not count.
    check: Result<(), String>,
}

fn write_plot(path: &Path, svg: &str) -> Result<(), Exit> {
    std::fs::write(path, svg).map_err(|e| Exit::refused(format!("--plot: {}: {e}", path.display())))
}
