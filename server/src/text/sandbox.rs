//! A process that runs a chat template's program: what it takes of memory is bounded, and it can be ended at any moment.
//!
//! A template's instruction may double a string, and no thread can be stopped in the middle of one. So a server renders in a
//! process of the same binary, which has a limit on its data and reads variables and writes texts, a line of JSON each. One
//! that takes too long or too much is replaced. It ends with its parent, by the end of its standard input.

use std::borrow::Cow;
use std::ffi::OsString;
use std::io::{self, BufRead, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::error::TextError;
use super::template::{ChatInput, ChatTemplate, MAX_OUTPUT_BYTES, PreparedChat, Program, RenderedChat};

/// Memory for data that the process may have.
const MAX_DATA_BYTES: u64 = 256 << 20;
/// After this long without an answer it is ended. The template's own deadline, which it looks at when it writes, is shorter; this
/// one has room for a machine that is busy.
const DEADLINE: Duration = Duration::from_secs(1);
/// The longest wait for chats that came before.
const QUEUE: Duration = Duration::from_secs(5);
/// The signal by which a Rust program without memory ends itself (SIGABRT).
const OUT_OF_MEMORY: i32 = 6;
/// The longest answer: every byte of the output may be escaped.
const MAX_ANSWER_BYTES: u64 = 6 * MAX_OUTPUT_BYTES as u64 + 1024;

/// What a rendering came to, as a line.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Text(String),
    Template(String),
    Limit(String),
    Time { limit_ms: u64 },
}

/// Renders one template for as long as it lives.
#[derive(Debug)]
pub struct Sandbox {
    program: OsString,
    arguments: Vec<OsString>,
    source: String,
    /// None before the first chat, and after a process that had to be ended.
    process: Mutex<Option<Process>>,
}

#[derive(Debug)]
struct Process {
    /// Ends when this is dropped.
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Sandbox {
    /// `program` with `arguments` is what calls [`render_for_parent`]; it is started when it is needed.
    pub fn new(program: OsString, arguments: Vec<OsString>, source: &str) -> Self {
        Self { program, arguments, source: source.to_owned(), process: Mutex::default() }
    }

    /// Starts the process before the first chat has to wait for it; a failure is that chat's.
    pub async fn warm_up(&self) {
        let mut place = self.process.lock().await;
        if place.is_none() {
            *place = self.start().await.ok();
        }
    }

    /// Renders a chat of `template`, which is the one that this runs.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`], and [`TextError::Sandbox`].
    pub async fn render(
        &self,
        template: &ChatTemplate,
        chat: &ChatInput<'_>,
    ) -> Result<RenderedChat, TextError> {
        let chat = template.prepare(chat)?;
        chat.finish(self.run(&chat).await)
    }

    /// Runs the template.
    ///
    /// # Errors
    /// As [`ChatTemplate::run`], and [`TextError::Sandbox`].
    pub async fn run(&self, chat: &PreparedChat) -> Result<String, TextError> {
        let failed = |error: io::Error| TextError::Sandbox(error.to_string());
        let mut line = serde_json::to_vec(chat.variables()).map_err(|error| failed(error.into()))?;
        line.push(b'\n');
        let mut place = timeout(QUEUE, self.process.lock()).await.map_err(|_| too_slow(QUEUE))?;
        // Taken out: whoever leaves in the middle must not leave a process with an answer that nobody read.
        let mut process = place.take();
        let answer = loop {
            let was_there = process.is_some();
            let mut current = match process.take() {
                Some(process) => process,
                None => self.start().await.map_err(failed)?,
            };
            match timeout(DEADLINE, current.ask(&line)).await.map_err(|_| too_slow(DEADLINE))? {
                Ok(answer) => {
                    *place = Some(current);
                    break answer;
                }
                Err(error) => match current.end(error).await {
                    // Somebody ended it since the last chat.
                    TextError::Sandbox(_) if was_there => {}
                    why => return Err(why),
                },
            }
        };
        match answer {
            Answer::Text(text) => Ok(text),
            Answer::Template(message) => Err(TextError::Template(message)),
            Answer::Limit(limit) => Err(TextError::TemplateLimit(limit.into())),
            Answer::Time { limit_ms } => Err(TextError::TemplateTime { limit_ms }),
        }
    }

    async fn start(&self) -> io::Result<Process> {
        let mut child = Command::new(&self.program)
            // For lists of processes: the program may be named by a path that says nothing.
            .arg0("tandem")
            .args(&self.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // That it has no memory is said here.
            .stderr(Stdio::null())
            // A terminal's interrupt is for the parent.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let mut input = child.stdin.take().expect("it is piped");
        let output = child.stdout.take().expect("it is piped");
        let mut line = serde_json::to_vec(&self.source)?;
        line.push(b'\n');
        timeout(DEADLINE, input.write_all(&line)).await.map_err(|_| io::ErrorKind::TimedOut)??;
        Ok(Process { child, input, output: BufReader::new(output) })
    }
}

impl Process {
    async fn ask(&mut self, line: &[u8]) -> io::Result<Answer> {
        self.input.write_all(line).await?;
        let mut answer = Vec::new();
        (&mut self.output).take(MAX_ANSWER_BYTES).read_until(b'\n', &mut answer).await?;
        if answer.last() != Some(&b'\n') {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_slice(&answer)?)
    }

    /// Why it gave no answer.
    async fn end(mut self, error: io::Error) -> TextError {
        match timeout(DEADLINE, self.child.wait()).await {
            Ok(Ok(status)) if ExitStatusExt::signal(&status) == Some(OUT_OF_MEMORY) => {
                TextError::TemplateLimit(format!("{} MiB of memory", MAX_DATA_BYTES >> 20).into())
            }
            Ok(Ok(status)) => TextError::Sandbox(format!("the process that renders ended with {status}")),
            _ => TextError::Sandbox(error.to_string()),
        }
    }
}

fn too_slow(limit: Duration) -> TextError {
    TextError::TemplateTime { limit_ms: limit.as_millis() as u64 }
}

/// The other side: renders what comes on standard input until it ends.
///
/// # Errors
/// If memory cannot be limited, or a pipe or the parent's lines are broken.
pub fn render_for_parent() -> io::Result<()> {
    use rustix::process::{Resource, Rlimit, setrlimit};
    setrlimit(Resource::Data, Rlimit { current: Some(MAX_DATA_BYTES), maximum: Some(MAX_DATA_BYTES) })?;
    let mut lines = io::stdin().lock().lines();
    let mut output = io::stdout().lock();
    let Some(source) = lines.next() else { return Ok(()) };
    let program = Program::new(&serde_json::from_str::<Cow<'_, str>>(&source?)?).map_err(io::Error::other)?;
    for line in lines {
        let answer = match program.run(&serde_json::from_str(&line?)?) {
            Ok(text) => Answer::Text(text),
            Err(TextError::Template(message)) => Answer::Template(message),
            Err(TextError::TemplateLimit(limit)) => Answer::Limit(limit.into_owned()),
            Err(TextError::TemplateTime { limit_ms }) => Answer::Time { limit_ms },
            Err(error) => return Err(io::Error::other(error)),
        };
        let mut line = serde_json::to_vec(&answer)?;
        line.push(b'\n');
        output.write_all(&line).and_then(|()| output.flush())?;
    }
    Ok(())
}
