//! All kernels of a program, loaded once and launched by name.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Arg, Compiler, Cuda, CudaError, Image, Kernel, KernelCache, LaunchShape, Module};
use super::{Origin, Source, Target};

/// Modules by their sources' names, and the kernels that were asked for.
#[derive(Debug)]
pub struct KernelSet {
    modules: HashMap<&'static str, Module>,
    kernels: HashMap<(&'static str, &'static str), Kernel>,
    /// Sources that had to be compiled, and why they will have to be again, if so.
    compiled: Vec<(&'static str, Origin)>,
}

impl KernelSet {
    /// Compiles `sources` (name and text), each behind `prelude`, for the device, or takes them from `cache`, and loads them.
    ///
    /// # Errors
    /// Those of [`Compiler::open`], [`Compiler::compile`] and [`Module::load`].
    pub fn load(
        cuda: &Cuda,
        cache: &KernelCache,
        prelude: &str,
        sources: impl IntoIterator<Item = (&'static str, &'static str)>,
    ) -> Result<Self, CudaError> {
        let compiler = Compiler::open()?;
        let target = cuda.target();
        let sources: Vec<_> = sources.into_iter().collect();
        let job = |&(name, text)| (Source { name, prelude, text }, target);
        let images = compile_all(&compiler, cache, &sources.iter().map(job).collect::<Vec<_>>())?;
        let mut set = Self { modules: HashMap::new(), kernels: HashMap::new(), compiled: Vec::new() };
        for ((name, _), image) in sources.into_iter().zip(images) {
            set.modules.insert(name, Module::load(cuda, &image)?);
            if image.origin != Origin::Cache {
                set.compiled.push((name, image.origin));
            }
        }
        Ok(set)
    }

    /// Fills `cache` with `sources` for every one of `targets`; needs no GPU and no driver. Returns how many were compiled, and how
    /// many were there.
    ///
    /// # Errors
    /// Those of [`Compiler::open`] and [`Compiler::compile`].
    pub fn fill_cache(
        cache: &KernelCache,
        prelude: &str,
        sources: impl IntoIterator<Item = (&'static str, &'static str)>,
        targets: &[Target],
    ) -> Result<(usize, usize), CudaError> {
        let compiler = Compiler::open()?;
        let each = |(name, text)| targets.iter().map(move |target| (Source { name, prelude, text }, *target));
        let jobs: Vec<_> = sources.into_iter().flat_map(each).collect();
        let images = compile_all(&compiler, cache, &jobs)?;
        let found = images.iter().filter(|image| image.origin == Origin::Cache).count();
        Ok((images.len() - found, found))
    }

    /// What had to be compiled at load: a line for the log.
    pub fn compiled(&self) -> &[(&'static str, Origin)] {
        &self.compiled
    }

    /// The kernel, looked up in its module the first time.
    ///
    /// # Errors
    /// `Kernel` if the module lacks it.
    ///
    /// # Panics
    /// If there is no such module.
    pub fn kernel(&mut self, module: &'static str, kernel: &'static str) -> Result<&mut Kernel, CudaError> {
        use std::collections::hash_map::Entry;
        match self.kernels.entry((module, kernel)) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let module = self.modules.get(module).unwrap_or_else(|| panic!("no module {module}"));
                Ok(entry.insert(module.kernel(kernel)?))
            }
        }
    }

    /// Queues a launch, with as much shared memory as it says. The first launch of a kernel allocates on the host; later ones do
    /// not.
    ///
    /// # Errors
    /// As [`Kernel::launch`], [`Kernel::allow_shared`] and [`KernelSet::kernel`].
    ///
    /// # Panics
    /// If there is no such module.
    ///
    /// # Safety
    /// As [`Kernel::launch`].
    pub unsafe fn launch(
        &mut self,
        module: &'static str,
        kernel: &'static str,
        shape: LaunchShape,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        // SAFETY: this function's contract.
        unsafe { self.launch_words(module, kernel, shape, args.iter().map(|arg| arg.word())) }
    }

    /// As [`KernelSet::launch`], with words as in [`Kernel::launch_words`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn launch_words(
        &mut self,
        module: &'static str,
        kernel: &'static str,
        shape: LaunchShape,
        args: impl ExactSizeIterator<Item = u64>,
    ) -> Result<(), CudaError> {
        let kernel = self.kernel(module, kernel)?;
        let shared_bytes = shape.shared_bytes as usize;
        if shared_bytes > kernel.max_shared_bytes() {
            kernel.allow_shared(shared_bytes)?;
        }
        // SAFETY: this function's contract.
        unsafe { kernel.launch_words(shape, args) }
    }
}

/// The images of all jobs in their order, made on all processors: a cold start otherwise takes seconds.
fn compile_all(
    compiler: &Compiler,
    cache: &KernelCache,
    jobs: &[(Source<'_>, Target)],
) -> Result<Vec<Image>, CudaError> {
    let next = AtomicUsize::new(0);
    let work = || -> Vec<(usize, Result<Image, CudaError>)> {
        let numbers = std::iter::from_fn(|| {
            let number = next.fetch_add(1, Ordering::Relaxed);
            (number < jobs.len()).then_some(number)
        });
        numbers.map(|number| (number, compiler.compile(cache, &jobs[number].0, jobs[number].1))).collect()
    };
    let num_threads = std::thread::available_parallelism().map_or(1, usize::from).min(jobs.len());
    let mut images = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..num_threads).map(|_| scope.spawn(work)).collect();
        let mut images = work();
        images
            .extend(threads.into_iter().flat_map(|thread| thread.join().expect("compiling does not panic")));
        images
    });
    images.sort_by_key(|(number, _)| *number);
    images.into_iter().map(|(_, image)| image).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::tests::{ALL, open};
    use crate::stub::{Stub, build_dir, counter, in_child, in_child_with, real};

    const SOURCES: [(&str, &str); 2] = [("first", "add shape"), ("second", "types")];

    #[test]
    fn kernels_are_launched_by_name_with_the_shared_memory_they_ask_for() {
        let test = "kernels_are_launched_by_name_with_the_shared_memory_they_ask_for";
        in_child((module_path!(), test), &ALL, &[], || {
            let cuda = open();
            let nowhere = KernelCache::at("/dev/null/nowhere");
            let mut set = KernelSet::load(&cuda, &nowhere, "", SOURCES).unwrap();
            assert_eq!(set.compiled().len(), 2);
            assert!(matches!(set.compiled()[0], ("first", Origin::CompiledInMemory(_))));
            let out = cuda.alloc(28).unwrap();
            for shared_bytes in [0, 90 << 10, 10] {
                let shape = LaunchShape::linear(3, 32).with_shared(shared_bytes);
                // SAFETY: the kernel's parameter; it writes seven words.
                unsafe { set.launch("first", "shape", shape, &[out.as_slice::<u32>().into()]) }.unwrap();
                let mut got = [0; 7];
                out.as_slice::<u32>().read(&mut got).unwrap();
                assert_eq!(got, [3, 1, 1, 32, 1, 1, shared_bytes]);
            }
            // SAFETY: refused before it is launched.
            let error = unsafe { set.launch("second", "add", LaunchShape::linear(1, 1), &[]) }.unwrap_err();
            assert!(error.to_string().starts_with("kernel add of second: "), "{error}");
            let missing = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                set.kernel("third", "add").map(|_| ())
            }));
            assert!(missing.is_err());
        });
    }

    #[test]
    fn a_filled_cache_serves_every_architecture() {
        let test = "a_filled_cache_serves_every_architecture";
        in_child((module_path!(), test), &ALL, &[], || {
            let folder = build_dir().join(format!("kernel-set-tests/{}", std::process::id()));
            let cache = KernelCache::at(&folder);
            assert_eq!(KernelSet::fill_cache(&cache, "before", SOURCES, &Target::ALL).unwrap(), (8, 0));
            assert_eq!(KernelSet::fill_cache(&cache, "before", SOURCES, &Target::ALL).unwrap(), (0, 8));
            let compiles = counter(Stub::Nvrtc, "compiles");
            let set = KernelSet::load(&open(), &cache, "before", SOURCES).unwrap();
            assert_eq!((set.compiled(), counter(Stub::Nvrtc, "compiles")), (&[][..], compiles));
            std::fs::remove_dir_all(folder).unwrap();
        });
    }

    #[test]
    fn the_real_nvrtc_compiles_many_at_once() {
        let Some(folder) = real("cu13", "libnvrtc.so.13") else { return };
        in_child_with((module_path!(), "the_real_nvrtc_compiles_many_at_once"), &[folder], &[], || {
            let folder = build_dir().join(format!("kernel-set-tests/real-{}", std::process::id()));
            let cache = KernelCache::at(&folder);
            let text = "extern \"C\" __global__ void add(int *out) { out[threadIdx.x] += N; }";
            let sources = ["a", "b", "c", "d"].map(|name| (name, text));
            assert_eq!(KernelSet::fill_cache(&cache, "#define N 1", sources, &Target::ALL).unwrap(), (16, 0));
            assert_eq!(KernelSet::fill_cache(&cache, "#define N 1", sources, &Target::ALL).unwrap(), (0, 16));
            let error = KernelSet::fill_cache(&cache, "", sources, &Target::ALL).unwrap_err();
            assert!(
                matches!(&error, CudaError::Compile { source_name, .. } if source_name == "a"),
                "{error}"
            );
            std::fs::remove_dir_all(folder).unwrap();
        });
    }
}
