//! `tandem bench`: an engine in this process, or a server somewhere.

use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use hyper::Uri;

use super::check::{self, CommonConfig, refuse};
use super::error::ConfigError;
use super::flags::BenchFlags;
use super::layers::Origins;
use super::secret::ApiKey;
use super::values::LogFormat;

/// Flags that say something of a server that is measured. All others are about an engine in this process.
const FLAGS_WITH_URL: [&str; 16] = [
    "api-key",
    "concurrency",
    "config",
    "endpoint",
    "format",
    "log-format",
    "log-level",
    "model",
    "num-requests",
    "output-tokens",
    "plot",
    "prompt-tokens",
    "seed",
    "served-model-name",
    "timeout",
    "url",
];
/// Flags that are about a server only.
const FLAGS_OF_URL: [&str; 4] = ["api-key", "endpoint", "served-model-name", "timeout"];
/// The most requests at once.
const MAX_CONCURRENCY: u64 = 4096;
/// Tokens of a window that perplexity is measured over: llama.cpp's default too.
const DEFAULT_PERPLEXITY_CONTEXT: u64 = 512;

/// `tandem bench`.
#[derive(Debug, Clone)]
pub struct BenchConfig {
    /// What is asked for.
    pub load: BenchLoad,
    /// Form of the result.
    pub format: OutputFormat,
    /// File that gets a drawing of the result.
    pub plot: Option<PathBuf>,
    /// Who is asked.
    pub target: BenchTarget,
    log_format: LogFormat,
    log_level: Option<String>,
}

/// The requests of a benchmark.
#[derive(Debug, Clone)]
pub struct BenchLoad {
    /// Tokens of each prompt.
    pub prompt_tokens: usize,
    /// Tokens of each answer.
    pub output_tokens: usize,
    /// Requests at once, one measurement for each.
    pub concurrency: Vec<usize>,
    /// Requests of each measurement; `None`: chosen by concurrency.
    pub num_requests: Option<usize>,
    /// Seed of the prompts.
    pub seed: Option<u64>,
}

/// Who answers the requests of a benchmark.
#[derive(Debug, Clone)]
pub enum BenchTarget {
    /// An engine in this process, without HTTP; the prefix cache is off.
    Engine(Box<CommonConfig>),
    /// The same, which scores a text instead of being timed.
    Perplexity(Box<CommonConfig>, PerplexityConfig),
    /// A server.
    Server(ServerTarget),
}

/// `tandem bench --perplexity`.
#[derive(Debug, Clone)]
pub struct PerplexityConfig {
    /// UTF-8 text.
    pub file: PathBuf,
    /// Tokens of a window.
    pub context: usize,
}

/// A server that speaks OpenAI's API.
#[derive(Debug, Clone)]
pub struct ServerTarget {
    /// Where it is.
    pub url: BaseUrl,
    /// The route that is asked.
    pub endpoint: Endpoint,
    /// Name of the model in requests; `None`: the first that the server names.
    pub model: Option<String>,
    /// What requests bring as `Authorization: Bearer`.
    pub api_key: Option<ApiKey>,
    /// How long a request may take, from the connection on.
    pub timeout: Duration,
}

/// A route that generates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Endpoint {
    /// `/v1/completions`
    Completions,
    /// `/v1/chat/completions`
    Chat,
}

/// How a result is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// A table.
    Text,
    /// One JSON object.
    Json,
}

/// `http://host:port/prefix`, of which the API's paths are below `prefix/v1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseUrl {
    /// Name or address, without the brackets of IPv6.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Host and port as they were written.
    pub authority: String,
    /// What stands before `/v1`; empty or a path without a slash at its end.
    pub prefix: String,
}

impl BenchConfig {
    /// Form and filter of the log.
    pub(crate) fn log(&self) -> (LogFormat, Option<&str>) {
        (self.log_format, self.log_level.as_deref())
    }
}

impl Endpoint {
    /// The path below the base.
    pub fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }
}

impl BaseUrl {
    /// Reads an address with or without `/v1` at its end.
    ///
    /// # Errors
    /// What is wrong with it, for a refusal.
    pub fn parse(text: &str) -> Result<Self, String> {
        let uri: Uri = text.parse().map_err(|e| format!("{text:?} is no address: {e}"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => {
                return Err("https is not supported; name the server behind the TLS proxy".to_owned());
            }
            _ => return Err(format!("{text:?} does not begin with http://")),
        }
        if uri.query().is_some() {
            return Err(format!("{text:?} has a query; give scheme, host, port and path only"));
        }
        let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
        let host = uri.host().unwrap_or_default();
        if host.is_empty() || authority.contains('@') {
            return Err(format!("{text:?} names no host, or more than a host"));
        }
        // A port that is none is read as no port.
        let port = match (uri.port_u16(), authority.ends_with(host)) {
            (Some(0), _) | (None, false) => return Err(format!("{text:?} has no port from 1 to 65535")),
            (port, _) => port.unwrap_or(80),
        };
        let path = uri.path().trim_end_matches('/');
        Ok(Self {
            host: host.trim_start_matches('[').trim_end_matches(']').to_owned(),
            port,
            prefix: path.strip_suffix("/v1").unwrap_or(path).to_owned(),
            authority,
        })
    }
}

pub(super) fn bench(flags: BenchFlags, origins: &Origins) -> Result<BenchConfig, ConfigError> {
    if let Some(&most) = flags.concurrency.iter().max().filter(|&&most| most > MAX_CONCURRENCY) {
        return Err(refuse(origins, "concurrency", format!("{most} is more than {MAX_CONCURRENCY}")));
    }
    let load = BenchLoad {
        prompt_tokens: flags.prompt_tokens as usize,
        output_tokens: flags.output_tokens as usize,
        concurrency: flags.concurrency.iter().map(|&n| n as usize).collect(),
        num_requests: flags.num_requests.map(|n| n as usize),
        seed: flags.model.options.seed,
    };
    let (format, plot) = (flags.format, flags.plot.clone());
    let (log_format, log_level) = (flags.log.log_format, flags.log.log_level.clone());
    if flags.context.is_some() && flags.perplexity.is_none() {
        return Err(refuse(origins, "context", "needs --perplexity"));
    }
    if flags.plot.is_some() && flags.perplexity.is_some() {
        return Err(refuse(origins, "plot", "shows speeds: leave it out beside --perplexity"));
    }
    let context = flags.context.unwrap_or(DEFAULT_PERPLEXITY_CONTEXT) as usize;
    let target = match (flags.url.clone(), flags.perplexity.clone()) {
        (Some(url), _) => BenchTarget::Server(server(flags, &url, origins)?),
        (None, Some(file)) => {
            let text = PerplexityConfig { file, context };
            BenchTarget::Perplexity(Box::new(engine(flags, origins)?), text)
        }
        (None, None) => BenchTarget::Engine(Box::new(engine(flags, origins)?)),
    };
    Ok(BenchConfig { load, format, plot, target, log_format, log_level })
}

fn engine(flags: BenchFlags, origins: &Origins) -> Result<CommonConfig, ConfigError> {
    if let Some(flag) = origins.on_command_line().find(|flag| FLAGS_OF_URL.contains(flag)) {
        return Err(refuse(origins, flag, "is about a server: give --url too"));
    }
    let BenchFlags { model, compute, memory, scheduling, log, .. } = flags;
    let (model, options) = check::split(model);
    let mut common = check::common(model, options, compute, memory, scheduling, log, origins)?;
    common.prefix_caching = false;
    Ok(common)
}

fn server(flags: BenchFlags, url: &str, origins: &Origins) -> Result<ServerTarget, ConfigError> {
    if let Some(flag) = origins.on_command_line().find(|flag| !FLAGS_WITH_URL.contains(flag)) {
        return Err(refuse(origins, flag, "is about an engine in this process: leave it out beside --url"));
    }
    if let Some(filter) = &flags.log.log_level {
        check::check_log_filter(filter).map_err(|message| refuse(origins, "log-level", message))?;
    }
    let url = BaseUrl::parse(url).map_err(|message| refuse(origins, "url", message))?;
    let key = flags.api_key.into_iter().next();
    if key.as_ref().is_some_and(|key| key.is_empty() || !key.bytes().all(|byte| (0x20..0x7f).contains(&byte)))
    {
        return Err(refuse(origins, "api-key", "must be printable ASCII"));
    }
    // A model that variable or file name is the path of `serve`, which tells nothing of this server's names.
    let (path, options) = check::split(flags.model);
    let named = options.model.or(path).filter(|_| origins.on_command_line().any(|flag| flag == "model"));
    let named = named.map(|path| path.to_string_lossy().into_owned());
    Ok(ServerTarget {
        url,
        endpoint: flags.endpoint,
        model: flags.served_model_name.into_iter().next().or(named),
        api_key: key.map(ApiKey::new),
        timeout: Duration::from_secs(flags.timeout),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_with_and_without_the_versions_path() {
        let parse = |text: &str| {
            BaseUrl::parse(text)
                .map(|url| format!("{} {} {} {}", url.host, url.port, url.authority, url.prefix))
        };
        assert_eq!(parse("http://a:8000").unwrap(), "a 8000 a:8000 ");
        assert_eq!(parse("http://a:8000/v1").unwrap(), "a 8000 a:8000 ");
        assert_eq!(parse("http://a/v1/").unwrap(), "a 80 a ");
        assert_eq!(parse("http://[::1]:81/llm/v1").unwrap(), "::1 81 [::1]:81 /llm");
        for bad in [
            "a:8000",
            "https://a",
            "http://",
            "http://a:99999",
            "http://a:0",
            "http://k@a",
            "http://a?x=1",
            "",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
