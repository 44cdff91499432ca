//! The process that runs a model's chat template: a command of this program that no user needs.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use super::Exit;
use crate::text::{ChatInput, ChatTemplate, RenderedChat, Sandbox, render_for_parent};

/// The command's name. It has no flags and no environment, so it is looked for before those are.
const COMMAND: &str = "render-templates";

/// Whether this process was started to render.
pub(super) fn is_asked_for(arguments: &[OsString]) -> bool {
    arguments.get(1).map(OsString::as_os_str) == Some(OsStr::new(COMMAND))
}

pub(super) fn render() -> Result<(), Exit> {
    render_for_parent().map_err(Exit::failed)
}

/// Renders one chat where there is no runtime.
pub(super) fn render_once(template: &ChatTemplate, chat: &ChatInput<'_>) -> Result<RenderedChat, Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Exit::failed(format!("no runtime: {error}")))?;
    runtime.block_on(of(template).render(template, chat)).map_err(Exit::refused)
}

/// A sandbox for the template. The program is found even if its file was replaced since it was started.
pub(super) fn of(template: &ChatTemplate) -> Sandbox {
    const SELF: &str = "/proc/self/exe";
    let program = match Path::new(SELF).exists() {
        true => SELF.into(),
        false => std::env::current_exe().map_or_else(|_| "tandem".into(), OsString::from),
    };
    Sandbox::new(program, vec![COMMAND.into()], template.source())
}
