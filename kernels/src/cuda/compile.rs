//! Kernels from source: NVRTC, for the architecture of a device, through the cache.
//!
//! NVRTC needs neither a GPU nor a driver, so an image build can fill the cache for every architecture ([`Target::ALL`]).

use std::ffi::{CStr, CString};

use cudarc::nvrtc::result::{self, NvrtcError};
use cudarc::nvrtc::sys;

use super::cache::{CacheKey, KernelCache, Origin};
use super::driver;
use super::{CudaError, Unavailable};

/// For every source alike.
const OPTIONS: [&str; 1] = ["--std=c++17"];

/// Architectures that kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    Sm80,
    Sm89,
    /// With what only 9.0 has: wgmma, TMA, setmaxnreg.
    Sm90a,
    /// With what only 10.0 has: tcgen05.
    Sm100a,
}

/// What the compiler leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageForm {
    /// Machine code: runs on its own architecture, and within one major version on later minor ones.
    Cubin,
    /// Assembly that the driver translates when it is loaded: runs on anything later.
    Ptx,
}

/// What a source is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    pub architecture: Architecture,
    pub form: ImageForm,
}

impl Target {
    /// What an image build fills the cache for.
    pub const ALL: [Self; 4] = [
        Self::cubin(Architecture::Sm80),
        Self::cubin(Architecture::Sm89),
        Self::cubin(Architecture::Sm90a),
        Self::cubin(Architecture::Sm100a),
    ];

    const fn cubin(architecture: Architecture) -> Self {
        Self { architecture, form: ImageForm::Cubin }
    }

    /// The nearest target that runs on a device of this compute capability; none below 8.0.
    ///
    /// Machine code runs on later minor versions of its major version (8.6 takes that of 8.0), but that of 9.0a and 10.0a runs
    /// there only. So 10.3, 12.0 and what comes later get the assembly of 8.9, the last architecture here without an `a`.
    pub const fn for_capability(major: i32, minor: i32) -> Option<Self> {
        match (major, minor) {
            (..8, _) => None,
            (8, 9..) => Some(Self::cubin(Architecture::Sm89)),
            (8, _) => Some(Self::cubin(Architecture::Sm80)),
            (9, 0) => Some(Self::cubin(Architecture::Sm90a)),
            (10, 0) => Some(Self::cubin(Architecture::Sm100a)),
            _ => Some(Self { architecture: Architecture::Sm89, form: ImageForm::Ptx }),
        }
    }

    /// Whether kernels of it wait by themselves for the launch before (`wait_for_previous_launch` in `common.cuh`), and so may begin
    /// early. Assembly for an older architecture does not, wherever it runs.
    pub const fn waits_for_launches(self) -> bool {
        matches!(self.architecture, Architecture::Sm90a | Architecture::Sm100a)
    }

    /// As the compiler is told: `sm_90a` for machine code, `compute_89` for assembly.
    pub const fn name(self) -> &'static str {
        match (self.form, self.architecture) {
            (ImageForm::Cubin, Architecture::Sm80) => "sm_80",
            (ImageForm::Cubin, Architecture::Sm89) => "sm_89",
            (ImageForm::Cubin, Architecture::Sm90a) => "sm_90a",
            (ImageForm::Cubin, Architecture::Sm100a) => "sm_100a",
            (ImageForm::Ptx, Architecture::Sm80) => "compute_80",
            (ImageForm::Ptx, Architecture::Sm89) => "compute_89",
            (ImageForm::Ptx, Architecture::Sm90a) => "compute_90a",
            (ImageForm::Ptx, Architecture::Sm100a) => "compute_100a",
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// CUDA C, without headers.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The file's name in messages and in the cache.
    pub name: &'a str,
    /// What all sources begin with; may be empty.
    pub prelude: &'a str,
    pub text: &'a str,
}

/// A compiled source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    pub(super) name: String,
    pub(super) target: Target,
    /// For PTX with the zero at its end.
    pub(super) bytes: Vec<u8>,
    pub origin: Origin,
}

impl Image {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn target(&self) -> Target {
        self.target
    }
}

/// NVRTC, found and checked.
#[derive(Clone, Copy, Debug)]
pub struct Compiler {
    version: (i32, i32),
}

impl Compiler {
    /// # Errors
    /// `NoLibrary`, `NoSymbol` and `LibraryTooOld`. A driver is not needed.
    pub fn open() -> Result<Self, Unavailable> {
        Ok(Self { version: driver::nvrtc()? })
    }

    /// NVRTC's version, major and minor.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// The image of `source` for `target`, from `cache` if it is there.
    ///
    /// # Errors
    /// `Compile` with the compiler's log; `Compiler` if NVRTC itself fails, among others because it does not know the target.
    pub fn compile(
        &self,
        cache: &KernelCache,
        source: &Source<'_>,
        target: Target,
    ) -> Result<Image, CudaError> {
        // Messages name the file and its line, whatever stands before it.
        let text =
            format!("#line 1 \"prelude\"\n{}\n#line 1 \"{}\"\n{}", source.prelude, source.name, source.text);
        let key = CacheKey::new(source.name, &text, target.name(), &OPTIONS, self.version);
        let (bytes, origin) = cache.get_or_compile(&key, || run(source.name, &text, target))?;
        Ok(Image { name: source.name.to_owned(), target, bytes, origin })
    }
}

/// A program of NVRTC, destroyed when dropped.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program is ours and not destroyed yet. An error would mean that it is no program: nothing to free.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

/// One run of the compiler. Only [`Compiler`] calls it, so the library is there.
fn run(name: &str, text: &str, target: Target) -> Result<Vec<u8>, CudaError> {
    let failed = |reason: String| CudaError::Compiler {
        source_name: name.to_owned(),
        target: target.name().to_owned(),
        reason,
    };
    let text = CString::new(text).map_err(|_| failed("the source has a zero in it".into()))?;
    let name_c = CString::new(name).map_err(|_| failed("the name has a zero in it".into()))?;
    let program = Program(
        result::create_program(&text, Some(&name_c)).map_err(|error| failed(explain(error, target)))?,
    );
    let architecture = format!("--gpu-architecture={target}");
    let mut options = vec![architecture.as_str()];
    options.extend(OPTIONS);
    // SAFETY: the program is from `create_program`, and `text` and `name_c` live.
    if let Err(error) = unsafe { result::compile_program(program.0, &options) } {
        if error.0 != sys::nvrtcResult::NVRTC_ERROR_COMPILATION {
            return Err(failed(explain(error, target)));
        }
        return Err(CudaError::Compile {
            source_name: name.to_owned(),
            target: target.name().to_owned(),
            log: log(&program),
        });
    }
    let image = match target.form {
        ImageForm::Cubin => cubin(&program),
        // SAFETY: the program is from `create_program` and compiled.
        ImageForm::Ptx => unsafe { result::get_ptx(program.0) }
            .map(|chars| chars.into_iter().map(|c| c as u8).collect::<Vec<u8>>()),
    };
    let image = image.map_err(|error| failed(explain(error, target)))?;
    if image.is_empty() { Err(failed("it made nothing".into())) } else { Ok(image) }
}

fn cubin(program: &Program) -> Result<Vec<u8>, NvrtcError> {
    let mut size = 0;
    // SAFETY: the program is compiled; one size is written.
    unsafe { sys::nvrtcGetCUBINSize(program.0, &raw mut size) }.result()?;
    let mut bytes = vec![0u8; size];
    if size > 0 {
        // SAFETY: the program is compiled, and `bytes` is as long as it said.
        unsafe { sys::nvrtcGetCUBIN(program.0, bytes.as_mut_ptr().cast()) }.result()?;
    }
    Ok(bytes)
}

fn log(program: &Program) -> String {
    // SAFETY: the program is from `create_program`.
    let Ok(chars) = (unsafe { result::get_program_log(program.0) }) else { return "no log".into() };
    let bytes: Vec<u8> = chars.into_iter().map(|c| c as u8).collect();
    let text = CStr::from_bytes_until_nul(&bytes).unwrap_or_default();
    text.to_string_lossy().trim_end().to_owned()
}

fn explain(error: NvrtcError, target: Target) -> String {
    match error.0 {
        sys::nvrtcResult::NVRTC_ERROR_INVALID_OPTION => {
            format!("it refuses an option; a version that is too old does not know {target}")
        }
        sys::nvrtcResult::NVRTC_ERROR_BUILTIN_OPERATION_FAILURE => {
            "its builtins library (libnvrtc-builtins.so) is not where it looks; put its folder on LD_LIBRARY_PATH"
                .into()
        }
        _ => format!("{error}"),
    }
}

#[cfg(test)]
mod tests;
