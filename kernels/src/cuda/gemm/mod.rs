//! Matrix products by cuBLASLt: `y[M, N] = x[M, K] · W[N, K]ᵀ`, all three row by row.
//!
//! The library's own choice of an algorithm is an estimate, and asking for it costs more than a small product. So for each
//! (bucket of M, N, K, types) it is asked once for several, each is timed on the device, and the best is kept
//! ([`Gemm::warm_up`], at load). A run then changes the row count in the descriptions of its plan and queues the product: it
//! neither waits nor allocates, and may be captured.
//!
//! The algorithm, and with it the order of additions along K, depends on the bucket of M: on CUDA a row's result may depend on
//! how many rows there are.
//!
//! The tests check descriptions, layouts, choice and reuse against a stand-in that multiplies as it is told.

mod plan;

use std::collections::HashMap;
use std::fmt;

use cudarc::cublaslt::result as blas;
use cudarc::cublaslt::sys;
use half::bf16;

use self::plan::{ALIGNMENT, Addresses, Plan};
use super::{Cuda, CudaError, DeviceBuffer, DeviceSlice, Element, driver};

/// Rows up to which every bucket has plans of its own; more rows take the plan of this many.
pub const MAX_TUNED_ROWS: usize = 16_384;

/// Types of inputs and output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GemmTypes {
    Bf16ToBf16,
    Bf16ToF32,
    /// e4m3 inputs with one scale each; from compute capability 8.9 on. K and N are multiples of 16.
    Fp8ToBf16,
    /// e4m3 inputs with a scale for each row of `x` and of `W`; on 9.0 and from cuBLASLt 12.9 on.
    Fp8RowsToBf16,
}

/// One product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GemmShape {
    /// Rows of `x` and `y`.
    pub m: usize,
    /// Rows of `W`, columns of `y`.
    pub n: usize,
    /// Columns of `x` and `W`.
    pub k: usize,
    pub types: GemmTypes,
}

/// The scales of fp8 inputs: a product is `scale of x · scale of W · Σ x·W`.
#[derive(Clone, Copy, Debug)]
pub enum Fp8Scales<'a> {
    /// [1] each.
    PerTensor { x: DeviceSlice<'a, f32>, w: DeviceSlice<'a, f32> },
    /// [M] and [N].
    PerRow { x: DeviceSlice<'a, f32>, w: DeviceSlice<'a, f32> },
}

/// What a product may be written as.
pub trait GemmOutput: Element {
    /// For inputs of bf16.
    const BF16_TYPES: GemmTypes;
}

impl GemmOutput for bf16 {
    const BF16_TYPES: GemmTypes = GemmTypes::Bf16ToBf16;
}

impl GemmOutput for f32 {
    const BF16_TYPES: GemmTypes = GemmTypes::Bf16ToF32;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmOptions {
    /// Scratch that algorithms may use, allocated once.
    pub workspace_bytes: usize,
    /// Algorithms that are asked for and timed.
    pub candidates: usize,
    /// Times each is run; the mean time counts.
    pub rounds: usize,
    /// Sums of fp8 products in the tensor cores' own, shorter accumulators: faster, less exact.
    pub fp8_fast_accumulation: bool,
}

impl Default for GemmOptions {
    fn default() -> Self {
        Self { workspace_bytes: 32 << 20, candidates: 12, rounds: 5, fp8_fast_accumulation: false }
    }
}

/// What tuning one shape came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TunedGemm {
    /// With M the bucket's.
    pub shape: GemmShape,
    /// Algorithms that ran.
    pub candidates: usize,
    /// Which of them, in the library's order, is the best.
    pub best: usize,
    /// Its time, and that of the library's first choice.
    pub best_us: f32,
    pub first_us: f32,
}

impl fmt::Display for TunedGemm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { shape, candidates, best, best_us, first_us } = self;
        let tera_flops = 2.0 * (shape.m * shape.n * shape.k) as f32 / best_us / 1e6;
        write!(
            f,
            "{shape}: {best_us:.1} µs, {tera_flops:.0} TFLOP/s (algorithm {best} of {candidates}, the first {first_us:.1} µs)"
        )
    }
}

/// cuBLASLt on one device, with a workspace and plans. For one thread at a time.
pub struct Gemm {
    plans: HashMap<GemmShape, Plan>,
    handle: Handle,
    workspace: DeviceBuffer,
    options: GemmOptions,
    cuda: Cuda,
}

struct Handle {
    raw: sys::cublasLtHandle_t,
    cuda: Cuda,
}

// SAFETY: the handle may be used from any thread.
unsafe impl Send for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.cuda.bind().is_ok() {
            // SAFETY: the handle is ours. A failure leaves nothing to do.
            let _ = unsafe { blas::destroy_handle(self.raw) };
        }
    }
}

impl Gemm {
    /// # Errors
    /// `Unavailable` without cuBLASLt, `Gemm` if it does not start, `DeviceMemory` without room for the workspace.
    pub fn new(cuda: &Cuda, options: GemmOptions) -> Result<Self, CudaError> {
        driver::cublaslt()?;
        cuda.bind()?;
        let raw = blas::create_handle().map_err(|error| CudaError::Gemm {
            call: "cublasLtCreate",
            shape: "any shape".into(),
            code: error.to_string(),
        })?;
        let handle = Handle { raw, cuda: cuda.clone() };
        let workspace = cuda.alloc(options.workspace_bytes)?;
        Ok(Self { plans: HashMap::new(), handle, workspace, options, cuda: cuda.clone() })
    }

    /// Whether the device and the library multiply these types.
    ///
    /// # Errors
    /// `Unavailable` without cuBLASLt.
    pub fn can(&self, types: GemmTypes) -> Result<bool, CudaError> {
        let (major, minor) = self.cuda.info().capability;
        Ok(match types {
            GemmTypes::Bf16ToBf16 | GemmTypes::Bf16ToF32 => true,
            GemmTypes::Fp8ToBf16 => (major, minor) >= (8, 9),
            GemmTypes::Fp8RowsToBf16 => (major, minor) == (9, 0) && driver::cublaslt()? >= 120_900,
        })
    }

    /// Whether the library has an algorithm for this shape's bucket.
    ///
    /// # Errors
    /// `Gemm`, `Driver`, `Unavailable`.
    pub fn has(&self, shape: GemmShape) -> Result<bool, CudaError> {
        match self.plan(shape.bucket()) {
            Ok(_) => Ok(true),
            Err(CudaError::NoGemm { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Chooses an algorithm for each shape's bucket that has none, by time. Allocates operands to time with and frees them: the
    /// weights several times, so that they come from memory as in a step and not from the cache.
    ///
    /// # Errors
    /// `NoGemm`, `Gemm`, `DeviceMemory`, `InCapture`, `Driver`.
    pub fn warm_up(&mut self, shapes: &[GemmShape]) -> Result<Vec<TunedGemm>, CudaError> {
        self.cuda.forbid_in_capture("tuning")?;
        let mut buckets: Vec<GemmShape> = Vec::new();
        for shape in shapes {
            let bucket = shape.bucket();
            if !self.plans.contains_key(&bucket) && !buckets.contains(&bucket) {
                buckets.push(bucket);
            }
        }
        if buckets.is_empty() {
            return Ok(Vec::new());
        }
        let mut bench = plan::Bench::new(&self.cuda, &buckets)?;
        let mut tuned = Vec::with_capacity(buckets.len());
        for bucket in buckets {
            let mut plan = self.plan(bucket)?;
            tuned.push(plan.tune(self.handle.raw, &self.workspace, &mut bench, self.options.rounds)?);
            self.plans.insert(bucket, plan);
        }
        Ok(tuned)
    }

    /// Queues `y[m, n] = x[m, k] · w[n, k]ᵀ`. A shape whose bucket was never tuned takes the library's first choice, which is looked
    /// up once (and allocates then). 0 rows are nothing.
    ///
    /// # Errors
    /// `NoGemm`, `Gemm`, `Driver`.
    ///
    /// # Panics
    /// If a slice has not exactly the size that `m`, `n` and `k` say, starts on no multiple of 16 bytes, or is of another device.
    pub fn run<T: GemmOutput>(
        &mut self,
        (m, n, k): (usize, usize, usize),
        x: DeviceSlice<'_, bf16>,
        w: DeviceSlice<'_, bf16>,
        y: DeviceSlice<'_, T>,
    ) -> Result<(), CudaError> {
        let shape = GemmShape { m, n, k, types: T::BF16_TYPES };
        self.check(shape, x, w, y);
        let addresses = Addresses { x: x.address(), w: w.address(), y: y.address(), scales: None };
        self.run_addresses(shape, addresses)
    }

    /// The same with e4m3 inputs, bytes of one value each.
    ///
    /// # Errors
    /// As [`Gemm::run`]; `NoGemm` also for a device or a library that cannot do these scales.
    ///
    /// # Panics
    /// As [`Gemm::run`].
    pub fn run_fp8(
        &mut self,
        (m, n, k): (usize, usize, usize),
        x: DeviceSlice<'_, u8>,
        w: DeviceSlice<'_, u8>,
        y: DeviceSlice<'_, bf16>,
        scales: Fp8Scales<'_>,
    ) -> Result<(), CudaError> {
        let (types, scale_x, scale_w, lens) = match scales {
            Fp8Scales::PerTensor { x, w } => (GemmTypes::Fp8ToBf16, x, w, (1, 1)),
            Fp8Scales::PerRow { x, w } => (GemmTypes::Fp8RowsToBf16, x, w, (m, n)),
        };
        assert_eq!((scale_x.len(), scale_w.len()), lens, "scales of a product of {m} and {n} rows");
        let shape = GemmShape { m, n, k, types };
        self.check(shape, x, w, y);
        let scales = Some((scale_x.address(), scale_w.address()));
        self.run_addresses(shape, Addresses { x: x.address(), w: w.address(), y: y.address(), scales })
    }

    fn check<I: Element, O: Element>(
        &self,
        shape: GemmShape,
        x: DeviceSlice<'_, I>,
        w: DeviceSlice<'_, I>,
        y: DeviceSlice<'_, O>,
    ) {
        let GemmShape { m, n, k, .. } = shape;
        assert!(n > 0 && k > 0, "a product has columns");
        assert_eq!(x.len(), m * k, "x of {shape}");
        assert_eq!(w.len(), n * k, "W of {shape}");
        assert_eq!(y.len(), m * n, "y of {shape}");
        let same = self.cuda.is_same(x.cuda()) && self.cuda.is_same(w.cuda()) && self.cuda.is_same(y.cuda());
        assert!(same, "operands are on the device of the product");
        let aligned = [x.address(), w.address(), y.address()].iter().all(|at| at.is_multiple_of(ALIGNMENT));
        assert!(aligned, "operands of {shape} start on multiples of {ALIGNMENT} bytes");
    }

    fn run_addresses(&mut self, shape: GemmShape, addresses: Addresses) -> Result<(), CudaError> {
        if shape.m == 0 {
            return Ok(());
        }
        self.cuda.bind()?;
        let bucket = shape.bucket();
        if !self.plans.contains_key(&bucket) {
            let plan = self.plan(bucket)?;
            self.plans.insert(bucket, plan);
        }
        let plan = self.plans.get_mut(&bucket).expect("it was just put there");
        plan.run(self.handle.raw, &self.workspace, &self.cuda, shape.m, addresses)
    }

    fn plan(&self, bucket: GemmShape) -> Result<Plan, CudaError> {
        let able = self.can(bucket.types)?;
        if !able {
            return Err(CudaError::NoGemm { shape: bucket.to_string() });
        }
        Plan::new(self.handle.raw, bucket, &self.options)
    }
}

impl fmt::Debug for Gemm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gemm").field("plans", &self.plans.len()).finish_non_exhaustive()
    }
}

impl GemmShape {
    /// The shape that stands for this one in the table of plans.
    fn bucket(self) -> Self {
        Self { m: row_bucket(self.m), ..self }
    }
}

impl fmt::Display for GemmShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { m, n, k, types } = self;
        write!(f, "[{m}, {k}] · [{n}, {k}]ᵀ ({types:?})")
    }
}

/// The buckets of graphs, so that a captured step has plans of exactly its rows, then steps of a quarter or a third.
fn row_bucket(rows: usize) -> usize {
    if let Some(bucket) = super::bucket_of(rows) {
        return bucket;
    }
    if rows >= MAX_TUNED_ROWS {
        return MAX_TUNED_ROWS;
    }
    let power = rows.next_power_of_two();
    if rows <= power / 4 * 3 { power / 4 * 3 } else { power }
}

#[cfg(test)]
mod tests;
