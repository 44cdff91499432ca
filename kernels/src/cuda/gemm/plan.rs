//! One product's descriptions, its algorithm, and how that is chosen.

use std::ffi::c_void;

use cudarc::cublaslt::result::{self as blas, CublasError};
use cudarc::cublaslt::sys;

use super::{GemmOptions, GemmShape, GemmTypes, TunedGemm};
use crate::cuda::{Cuda, CudaError, DeviceBuffer, Timer};

use sys::cublasLtMatmulDescAttributes_t as DescAttribute;

/// `CUBLAS_OP_N` and `CUBLAS_OP_T` of the library's header, which the bindings leave out.
const OPERATION_PLAIN: i32 = 0;
const OPERATION_TRANSPOSED: i32 = 1;

/// What operands start on a multiple of, in bytes.
pub(super) const ALIGNMENT: u64 = 16;

/// Where the operands of one run lie.
#[derive(Clone, Copy)]
pub(super) struct Addresses {
    pub(super) x: u64,
    pub(super) w: u64,
    pub(super) y: u64,
    /// Of `x` and `W`.
    pub(super) scales: Option<(u64, u64)>,
}

/// A matrix here row by row is one column by column for the library, transposed: its product is yᵀ[N, M] = W[N, K] · xᵀ[K, M], its
/// first operand W, stored as K × N and to be transposed, its second x, stored as K × M. That is also the only form for fp8.
pub(super) struct Plan {
    shape: GemmShape,
    desc: Desc,
    w: Layout,
    x: Layout,
    y: Layout,
    /// Rows for which `x` and `y` are laid out at the moment.
    rows: usize,
    algorithms: Vec<sys::cublasLtMatmulAlgo_t>,
    best: usize,
    /// The algorithm was refused for other rows than the bucket's: the library chooses by itself for them.
    refused: bool,
}

/// Owned descriptions; plain host memory of the library.
struct Desc(sys::cublasLtMatmulDesc_t);
struct Layout(sys::cublasLtMatrixLayout_t);
pub(super) struct Preference(sys::cublasLtMatmulPreference_t);

// SAFETY: a description is memory of its owner, tied to no thread.
unsafe impl Send for Desc {}
// SAFETY: as above.
unsafe impl Send for Layout {}

impl Drop for Desc {
    fn drop(&mut self) {
        // SAFETY: ours; a failure leaves nothing to do.
        let _ = unsafe { blas::destroy_matmul_desc(self.0) };
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: as above.
        let _ = unsafe { blas::destroy_matrix_layout(self.0) };
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: as above.
        let _ = unsafe { blas::destroy_matmul_pref(self.0) };
    }
}

impl Plan {
    /// Descriptions for the bucket's rows, and the algorithms that the library proposes, its first choice kept.
    pub(super) fn new(
        handle: sys::cublasLtHandle_t,
        shape: GemmShape,
        options: &GemmOptions,
    ) -> Result<Self, CudaError> {
        let mut plan = Self::describe(shape, options.fp8_fast_accumulation)?;
        plan.algorithms = plan.propose(handle, options).map_err(|error| match error {
            Some(error) => gemm_error("cublasLtMatmulAlgoGetHeuristic", shape, error),
            None => CudaError::NoGemm { shape: shape.to_string() },
        })?;
        Ok(plan)
    }

    /// The descriptions alone, which need no device.
    pub(super) fn describe(shape: GemmShape, fp8_fast_accumulation: bool) -> Result<Self, CudaError> {
        let failed = |call| move |error| gemm_error(call, shape, error);
        let (input, output) = shape.types.data_types();
        let GemmShape { m, n, k, types } = shape;
        let desc = Desc(
            blas::create_matmul_desc(
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cudaDataType_t::CUDA_R_32F,
            )
            .map_err(failed("cublasLtMatmulDescCreate"))?,
        );
        let set =
            |attribute, value: &[u8]| desc.set(attribute, value).map_err(failed("setting an attribute"));
        set(DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, &OPERATION_TRANSPOSED.to_ne_bytes())?;
        set(DescAttribute::CUBLASLT_MATMUL_DESC_TRANSB, &OPERATION_PLAIN.to_ne_bytes())?;
        if types.is_fp8() {
            let fast = i8::from(fp8_fast_accumulation);
            set(DescAttribute::CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast.to_ne_bytes())?;
            // Algorithms are proposed for operands with scales only if there are some; the address is set anew at each run.
            let somewhere = 256u64.to_ne_bytes();
            set(DescAttribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &somewhere)?;
            set(DescAttribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &somewhere)?;
        }
        if types == GemmTypes::Fp8RowsToBf16 {
            let mode = sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F as i32;
            set(DescAttribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode.to_ne_bytes())?;
            set(DescAttribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode.to_ne_bytes())?;
        }
        let layout = |data_type, rows, cols| {
            Layout::new(data_type, rows, cols).map_err(failed("cublasLtMatrixLayoutCreate"))
        };
        let w = layout(input, k, n)?;
        let x = layout(input, k, m)?;
        let y = layout(output, n, m)?;
        let (algorithms, best) = (Vec::new(), 0);
        Ok(Self { shape, desc, w, x, y, rows: m, algorithms, best, refused: false })
    }

    /// `Err(None)` if there is none.
    fn propose(
        &self,
        handle: sys::cublasLtHandle_t,
        options: &GemmOptions,
    ) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, Option<CublasError>> {
        let preference = Preference::new(options.workspace_bytes)?;
        let asked = options.candidates.clamp(1, 64);
        // SAFETY: all zero is a value: numbers, and a status that is success.
        let mut found = vec![unsafe { std::mem::zeroed::<sys::cublasLtMatmulHeuristicResult_t>() }; asked];
        let mut count = 0;
        // SAFETY: all descriptions live, and `found` has room for `asked`.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                handle,
                self.desc.0,
                self.w.0,
                self.x.0,
                self.y.0,
                self.y.0,
                preference.0,
                asked as i32,
                found.as_mut_ptr(),
                &raw mut count,
            )
        };
        match status.result() {
            Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => return Err(None),
            other => other?,
        }
        found.truncate(usize::try_from(count).unwrap_or(0));
        let usable = |result: &sys::cublasLtMatmulHeuristicResult_t| {
            result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
                && result.workspaceSize <= options.workspace_bytes
        };
        let algorithms: Vec<_> =
            found.iter().filter(|result| usable(result)).map(|result| result.algo).collect();
        if algorithms.is_empty() { Err(None) } else { Ok(algorithms) }
    }

    /// Times every algorithm at the bucket's rows and keeps the best. Equal times keep the library's order.
    pub(super) fn tune(
        &mut self,
        handle: sys::cublasLtHandle_t,
        workspace: &DeviceBuffer,
        bench: &mut Bench,
        rounds: usize,
    ) -> Result<TunedGemm, CudaError> {
        let mut best: Option<(usize, f32)> = None;
        let (mut ran, mut first_us) = (0, f32::INFINITY);
        for index in 0..self.algorithms.len() {
            // A proposal that does not run is no error: there are others.
            let Some(us) = self.time_us(handle, workspace, bench, index, rounds.max(1))? else { continue };
            if ran == 0 {
                first_us = us;
            }
            ran += 1;
            if best.is_none_or(|(_, least_us)| us < least_us) {
                best = Some((index, us));
            }
        }
        let (best, best_us) = best.ok_or_else(|| CudaError::NoGemm { shape: self.shape.to_string() })?;
        self.best = best;
        Ok(TunedGemm { shape: self.shape, candidates: ran, best, best_us, first_us })
    }

    /// The mean time of an algorithm on the device; none if the library refuses it.
    fn time_us(
        &self,
        handle: sys::cublasLtHandle_t,
        workspace: &DeviceBuffer,
        bench: &mut Bench,
        index: usize,
        rounds: usize,
    ) -> Result<Option<f32>, CudaError> {
        let algorithm = self.algorithms[index];
        let queue = |bench: &Bench, round| {
            let addresses = bench.addresses(self.shape, round);
            self.queue(handle, workspace, &bench.cuda, addresses, Some(&algorithm))
        };
        // The first run loads the algorithm's code and does not count.
        if queue(bench, 0).is_err() {
            return Ok(None);
        }
        bench.cuda.synchronize()?;
        bench.start()?;
        let all = (1..=rounds).try_for_each(|round| queue(bench, round));
        let us = bench.timer.stop_us()?;
        Ok(all.is_ok().then_some(us / rounds as f32))
    }

    /// Queues the product of `m` rows.
    pub(super) fn run(
        &mut self,
        handle: sys::cublasLtHandle_t,
        workspace: &DeviceBuffer,
        cuda: &Cuda,
        m: usize,
        addresses: Addresses,
    ) -> Result<(), CudaError> {
        self.set_rows(m)?;
        let at_bucket = m == self.shape.m;
        let shape = GemmShape { m, ..self.shape };
        if at_bucket || !self.refused {
            let algorithm = self.algorithms[self.best];
            match self.queue(handle, workspace, cuda, addresses, Some(&algorithm)) {
                Ok(()) => return Ok(()),
                // The algorithm was made for the bucket's rows; nothing was queued.
                Err(CublasError(
                    sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED
                    | sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE,
                )) if !at_bucket => self.refused = true,
                Err(error) => return Err(gemm_error("cublasLtMatmul", shape, error)),
            }
        }
        self.queue(handle, workspace, cuda, addresses, None)
            .map_err(|error| gemm_error("cublasLtMatmul", shape, error))
    }

    pub(super) fn set_rows(&mut self, m: usize) -> Result<(), CudaError> {
        if self.rows != m {
            let shape = GemmShape { m, ..self.shape };
            let set = |layout: &Layout| {
                layout
                    .set_cols(m)
                    .map_err(|error| gemm_error("cublasLtMatrixLayoutSetAttribute", shape, error))
            };
            set(&self.x)?;
            set(&self.y)?;
            self.rows = m;
        }
        Ok(())
    }

    /// Without an algorithm the library chooses.
    fn queue(
        &self,
        handle: sys::cublasLtHandle_t,
        workspace: &DeviceBuffer,
        cuda: &Cuda,
        addresses: Addresses,
        algorithm: Option<&sys::cublasLtMatmulAlgo_t>,
    ) -> Result<(), CublasError> {
        if let Some((x, w)) = addresses.scales {
            self.desc.set(DescAttribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &w.to_ne_bytes())?;
            self.desc.set(DescAttribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &x.to_ne_bytes())?;
        }
        let (one, zero) = (1.0f32, 0.0f32);
        let pointer = |address: u64| address as *mut c_void;
        // SAFETY: all descriptions live and say what lies at the addresses, which the caller checked against the shape; alpha and
        // beta are read before the call returns; the workspace is used by one stream, so by one product at a time.
        unsafe {
            blas::matmul(
                handle,
                self.desc.0,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                pointer(addresses.w),
                self.w.0,
                pointer(addresses.x),
                self.x.0,
                pointer(addresses.y),
                self.y.0,
                pointer(addresses.y),
                self.y.0,
                algorithm.map_or(std::ptr::null(), |algorithm| algorithm),
                pointer(workspace.as_slice::<u8>().address()),
                workspace.bytes(),
                cuda.cu_stream().cast(),
            )
        }
    }
}

impl Desc {
    fn set(&self, attribute: DescAttribute, value: &[u8]) -> Result<(), CublasError> {
        // SAFETY: the description lives; the library checks the length of the value, which it copies.
        unsafe { blas::set_matmul_desc_attribute(self.0, attribute, value.as_ptr().cast(), value.len()) }
    }
}

impl Preference {
    pub(super) fn new(workspace_bytes: usize) -> Result<Self, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Self(blas::create_matmul_pref()?);
        let set = |attribute, value: &[u8]| {
            // SAFETY: the library checks the length of the value, which it copies.
            unsafe {
                blas::set_matmul_pref_attribute(preference.0, attribute, value.as_ptr().cast(), value.len())
            }
        };
        let workspace = workspace_bytes as u64;
        set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace.to_ne_bytes())?;
        // Otherwise the library proposes what needs operands on multiples of 256.
        let alignment = (ALIGNMENT as u32).to_ne_bytes();
        set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &alignment)?;
        set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &alignment)?;
        set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &alignment)?;
        set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &alignment)?;
        Ok(preference)
    }
}

impl Layout {
    /// Column by column without gaps.
    fn new(data_type: sys::cudaDataType_t, rows: usize, cols: usize) -> Result<Self, CublasError> {
        blas::create_matrix_layout(data_type, rows as u64, cols as u64, rows as i64).map(Self)
    }

    fn set_cols(&self, cols: usize) -> Result<(), CublasError> {
        use sys::cublasLtMatrixLayoutAttribute_t::CUBLASLT_MATRIX_LAYOUT_COLS as COLS;
        let cols = cols as u64;
        // SAFETY: the description lives, and the attribute is 64 bits.
        unsafe { blas::set_matrix_layout_attribute(self.0, COLS, (&raw const cols).cast(), 8) }
    }
}

impl GemmTypes {
    const fn is_fp8(self) -> bool {
        matches!(self, Self::Fp8ToBf16 | Self::Fp8RowsToBf16)
    }

    /// Of both inputs and of the output.
    const fn data_types(self) -> (sys::cudaDataType_t, sys::cudaDataType_t) {
        use sys::cudaDataType_t::{CUDA_R_8F_E4M3, CUDA_R_16BF, CUDA_R_32F};
        match self {
            Self::Bf16ToBf16 => (CUDA_R_16BF, CUDA_R_16BF),
            Self::Bf16ToF32 => (CUDA_R_16BF, CUDA_R_32F),
            Self::Fp8ToBf16 | Self::Fp8RowsToBf16 => (CUDA_R_8F_E4M3, CUDA_R_16BF),
        }
    }

    const fn bytes(self) -> (usize, usize) {
        match self {
            Self::Bf16ToBf16 => (2, 2),
            Self::Bf16ToF32 => (2, 4),
            Self::Fp8ToBf16 | Self::Fp8RowsToBf16 => (1, 2),
        }
    }
}

fn gemm_error(call: &'static str, shape: GemmShape, error: CublasError) -> CudaError {
    CudaError::Gemm { call, shape: shape.to_string(), code: error.to_string() }
}

/// Operands to time with, and the clock.
pub(super) struct Bench {
    cuda: Cuda,
    x: DeviceBuffer,
    w: DeviceBuffer,
    y: DeviceBuffer,
    /// Ones, for as many rows as any operand has.
    scales: DeviceBuffer,
    timer: Timer,
}

impl Bench {
    pub(super) fn new(cuda: &Cuda, shapes: &[GemmShape]) -> Result<Self, CudaError> {
        let most = |bytes: fn(&GemmShape) -> usize| shapes.iter().map(bytes).max().unwrap_or(0);
        let w_bytes = most(|shape| shape.n * shape.k * shape.types.bytes().0);
        // Twice the cache: by the time a copy is used again, none of it is left there.
        let w = cuda.alloc_zeroed(align(w_bytes).max(2 * cuda.info().l2_bytes))?;
        let x = cuda.alloc_zeroed(most(|shape| shape.m * shape.k * shape.types.bytes().0))?;
        let y = cuda.alloc_zeroed(most(|shape| shape.m * shape.n * shape.types.bytes().1))?;
        let scales = cuda.alloc(4 * most(|shape| shape.m.max(shape.n)))?;
        scales.as_slice::<f32>().write(&vec![1.0; scales.bytes() / 4])?;
        Ok(Self { cuda: cuda.clone(), x, w, y, scales, timer: Timer::new(cuda)? })
    }

    fn addresses(&self, shape: GemmShape, round: usize) -> Addresses {
        let w_bytes = align(shape.n * shape.k * shape.types.bytes().0);
        let copies = (self.w.bytes() / w_bytes).max(1);
        let scales = self.scales.as_slice::<f32>().address();
        Addresses {
            x: self.x.as_slice::<u8>().address(),
            w: self.w.as_slice::<u8>().address() + (round % copies * w_bytes) as u64,
            y: self.y.as_slice::<u8>().address(),
            scales: shape.types.is_fp8().then_some((scales, scales)),
        }
    }

    /// Keeps the device busy for some microseconds first, so that the products are queued by the time it comes to them: their own
    /// time is measured, not that of queueing them. It also leaves nothing of the operands in the cache.
    fn start(&mut self) -> Result<(), CudaError> {
        self.w.as_slice::<u8>().fill_bytes(0)?;
        self.timer.start()
    }
}

/// Operands start where vectors of any width may.
fn align(bytes: usize) -> usize {
    bytes.next_multiple_of(256)
}
