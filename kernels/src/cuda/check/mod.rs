//! Every kernel against a plain loop, on any [`Launcher`].
//!
//! Inputs are drawn anew from the seed, outputs are filled with NaN before, and each buffer lies between guards of NaN:
//! reading beyond it spoils a result, writing beyond it is found. Tolerances are those that the storage types justify: a
//! bf16 is within 2⁻⁹ of its value, and so are the probabilities that attention multiplies; sums are in f32.

mod attention;
mod collective;
mod columns;
mod elementwise;
mod linear;
mod once;
mod random;
mod sampling;

use half::{bf16, f16};

pub use once::{SEED, check_once};

use super::launcher::{Address, Launch, Launcher};
use random::Random;

/// What came of one case.
#[derive(Clone, Debug)]
pub struct CheckResult {
    /// Kernel and shape.
    pub name: String,
    /// The largest relative error seen, as a norm.
    pub error: f64,
    /// Why the case failed.
    pub failure: Option<String>,
}

/// Runs the checks of a group.
pub type Group = fn(&mut Checks<'_>);

/// The groups of checks: one per module of kernels, but for what needs several of them.
pub const GROUPS: &[(&str, Group)] = &[
    ("embed", elementwise::embed),
    ("norm", elementwise::norm),
    ("rope", elementwise::rope),
    ("activation", elementwise::activation),
    ("blocks", elementwise::blocks),
    ("columns", columns::columns),
    ("gemv", linear::gemv),
    ("skinny_gemm", linear::skinny_gemm),
    ("quantize", linear::quantize),
    ("attention_decode", attention::decode),
    ("attention_prefill", attention::prefill),
    ("argmax", sampling::argmax),
    ("sample", sampling::sample),
    ("log_probs", sampling::log_probs),
    ("all_reduce", collective::all_reduce),
];

/// Checks all kernels; those of collectives only where launches can run at the same time, which they wait for.
/// `seen` gets what came of each case.
pub fn check_all(launcher: &mut dyn Launcher, seed: u64, mut seen: impl FnMut(CheckResult)) {
    GROUPS.iter().for_each(|&(_, group)| check(launcher, group, seed, &mut seen));
}

/// Runs one of the [`GROUPS`].
pub fn check(launcher: &mut dyn Launcher, group: Group, seed: u64, seen: &mut dyn FnMut(CheckResult)) {
    group(&mut Checks { launcher, random: Random::new(seed), seen });
}

/// Cases under way.
pub struct Checks<'a> {
    launcher: &'a mut dyn Launcher,
    random: Random,
    seen: &'a mut dyn FnMut(CheckResult),
}

impl Checks<'_> {
    fn case(&mut self, name: String, body: impl FnOnce(&mut Case<'_>) -> Result<(), String>) {
        let mut case =
            Case { launcher: self.launcher, random: &mut self.random, allocations: Vec::new(), error: 0.0 };
        let mut outcome = body(&mut case);
        if outcome.is_ok() {
            outcome = case.check_guards();
        }
        case.allocations.iter().for_each(|&(address, _)| case.launcher.free(address));
        let error = case.error;
        (self.seen)(CheckResult { name, error, failure: outcome.err() });
    }
}

/// On both sides of a buffer.
const GUARD_BYTES: usize = 1024;

/// One case: its buffers live as long as it does.
struct Case<'a> {
    launcher: &'a mut dyn Launcher,
    random: &'a mut Random,
    allocations: Vec<(Address, usize)>,
    error: f64,
}

/// Device memory of a number of values.
#[derive(Clone, Copy)]
struct Buffer<T> {
    address: Address,
    len: usize,
    of: std::marker::PhantomData<T>,
}

/// What buffers hold.
///
/// # Safety
/// Any bits are a value, and there is no padding.
unsafe trait Element: Copy {}
// SAFETY: numbers are.
unsafe impl Element for u8 {}
// SAFETY: as above.
unsafe impl Element for i8 {}
// SAFETY: as above.
unsafe impl Element for i32 {}
// SAFETY: as above.
unsafe impl Element for u32 {}
// SAFETY: as above.
unsafe impl Element for u64 {}
// SAFETY: as above.
unsafe impl Element for f32 {}
// SAFETY: as above.
unsafe impl Element for bf16 {}
// SAFETY: as above.
unsafe impl Element for f16 {}

fn bytes_of<T: Element>(values: &[T]) -> &[u8] {
    // SAFETY: elements have no padding, and the slice is borrowed as long as the answer.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn values_of<T: Element>(bytes: &[u8]) -> Vec<T> {
    let values = bytes.chunks_exact(size_of::<T>());
    // SAFETY: each chunk has the bytes of an element, whatever its alignment, and any bits are one.
    values.map(|chunk| unsafe { chunk.as_ptr().cast::<T>().read_unaligned() }).collect()
}

impl Case<'_> {
    /// A buffer full of NaN.
    fn output<T: Element>(&mut self, len: usize) -> Result<Buffer<T>, String> {
        let bytes = len * size_of::<T>();
        let address = self.launcher.allocate(bytes + 2 * GUARD_BYTES)?;
        self.allocations.push((address, bytes));
        self.launcher.upload(address, &vec![0xff; bytes + 2 * GUARD_BYTES])?;
        Ok(Buffer { address: address + GUARD_BYTES as u64, len, of: std::marker::PhantomData })
    }

    fn input<T: Element>(&mut self, values: &[T]) -> Result<Buffer<T>, String> {
        let buffer = self.output(values.len())?;
        self.launcher.upload(buffer.address, bytes_of(values))?;
        Ok(buffer)
    }

    fn read<T: Element>(&mut self, buffer: Buffer<T>) -> Result<Vec<T>, String> {
        let mut bytes = vec![0; buffer.len * size_of::<T>()];
        self.launcher.download(buffer.address, &mut bytes)?;
        Ok(values_of(&bytes))
    }

    fn launch(&mut self, launch: Launch) -> Result<(), String> {
        self.launcher.launch(&launch)
    }

    fn check_guards(&mut self) -> Result<(), String> {
        for &(address, bytes) in &self.allocations {
            let mut all = vec![0; bytes + 2 * GUARD_BYTES];
            self.launcher.download(address, &mut all)?;
            let (before, rest) = all.split_at(GUARD_BYTES);
            if before.iter().chain(&rest[bytes..]).any(|&byte| byte != 0xff) {
                return Err(format!("wrote beyond a buffer of {bytes} bytes"));
            }
        }
        Ok(())
    }

    /// Whether values are those expected, as a whole and each of them.
    fn expect(
        &mut self,
        what: &str,
        found: impl IntoIterator<Item = f32>,
        expected: &[f64],
        tolerance: f64,
    ) -> Result<(), String> {
        let found: Vec<f64> = found.into_iter().map(f64::from).collect();
        assert_eq!(found.len(), expected.len(), "{what}");
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let whole = norm(&mut expected.iter().copied());
        let difference = norm(&mut found.iter().zip(expected).map(|(a, b)| a - b));
        let error = if difference == 0.0 { 0.0 } else { difference / whole };
        self.error = if self.error.is_nan() || error.is_nan() { f64::NAN } else { self.error.max(error) };
        // One wrong value among thousands hardly shows in a norm. NaN is not less than anything, so it never passes.
        let usual = whole / (expected.len().max(1) as f64).sqrt();
        let right = |a: f64, b: f64| (a - b).abs() <= 8.0 * tolerance * (b.abs() + usual);
        if let Some(at) = (0..found.len()).find(|&at| !right(found[at], expected[at])) {
            return Err(format!("{what}[{at}] is {} instead of {}", found[at], expected[at]));
        }
        if error <= tolerance {
            return Ok(());
        }
        Err(format!("{what} has a relative error of {error:.2e}, more than {tolerance:.0e}"))
    }

    fn expect_bf16(&mut self, what: &str, found: Buffer<bf16>, expected: &[f64]) -> Result<(), String> {
        let found = self.read(found)?;
        self.expect(what, found.into_iter().map(bf16::to_f32), expected, 4e-3)
    }

    fn expect_f32(&mut self, what: &str, found: Buffer<f32>, expected: &[f64]) -> Result<(), String> {
        let found = self.read(found)?;
        self.expect(what, found, expected, 1e-5)
    }

    fn expect_equal<T: Element>(
        &mut self,
        what: &str,
        found: Buffer<T>,
        expected: &[T],
    ) -> Result<(), String> {
        let found = self.read(found)?;
        let wrong = (found.iter().zip(expected))
            .position(|(a, b)| bytes_of(std::slice::from_ref(a)) != bytes_of(std::slice::from_ref(b)));
        match wrong {
            Some(at) => Err(format!("{what}[{at}] of {} differs", expected.len())),
            None => Ok(()),
        }
    }
}

/// bf16 as the reference takes them.
fn wide(values: &[bf16]) -> Vec<f64> {
    values.iter().map(|x| x.to_f64()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::emulator::Emulator;
    use super::*;

    /// Under one seed, or as many as `TANDEM_CHECK_SEEDS` says.
    fn passes(name: &str) {
        let (_, group) = GROUPS.iter().find(|(group, _)| *group == name).expect("a group of this name");
        let num_seeds: u64 = std::env::var("TANDEM_CHECK_SEEDS").map_or(1, |n| n.parse().expect("a number"));
        for seed in 11..11 + num_seeds {
            let Some(mut emulator) = Emulator::new(seed) else { return };
            let mut results = Vec::new();
            check(&mut emulator, *group, seed, &mut |result| results.push(result));
            assert!(!results.is_empty());
            let failures =
                || results.iter().filter_map(|result| Some((&result.name, result.failure.as_ref()?)));
            // What fails often fails everywhere: a few say enough.
            failures().take(3).for_each(|(name, failure)| eprintln!("seed {seed}, {name}: {failure}"));
            assert_eq!(failures().count(), 0, "of {}", results.len());
        }
    }

    macro_rules! groups {
        ($($group:ident)*) => {
            $(#[test]
            fn $group() {
                passes(stringify!($group));
            })*

            #[test]
            fn every_group_has_a_test() {
                assert_eq!(GROUPS.iter().map(|(name, _)| *name).collect::<Vec<_>>(), [$(stringify!($group)),*]);
            }
        };
    }

    groups!(embed norm rope activation blocks columns gemv skinny_gemm quantize attention_decode attention_prefill argmax sample log_probs all_reduce);
}
