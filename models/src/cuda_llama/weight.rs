//! One linear layer on the device: how its weights are stored, and which product is the fastest for how many rows.

use half::bf16;
use tandem_kernels::cuda::launcher::{self, Address, Epilogue, MAX_GEMV_TOKENS, Product, Weights};
use tandem_kernels::cuda::{CudaError, DeviceBuffer, Fp8Scales, Gemm, GemmShape, GemmTypes, Runner};

use super::address;
use super::skinny::Skinny;

/// `y = x · Wᵀ + b`, with W `[N, K]`.
pub(super) struct Weight {
    pub(super) format: Format,
    /// bf16 `[N]`.
    pub(super) bias: Option<DeviceBuffer>,
    pub(super) out_features: usize,
    pub(super) in_features: usize,
}

/// How W is stored.
pub(super) enum Format {
    /// bf16 `[N, K]`.
    Bf16(DeviceBuffer),
    /// e4m3 `[N, K]`, scales f32 `[N]`; whether the library multiplies such, else products of many rows go by way of bf16.
    Fp8 { values: DeviceBuffer, scales: DeviceBuffer, is_multiplied: bool },
    /// GGUF's blocks of 32 taken apart: values as the file has them, scales f16 `[N, K / 32]`, and where the type has them mins.
    Blocks { kind: BlockKind, values: DeviceBuffer, scales: DeviceBuffer, mins: Option<DeviceBuffer> },
}

/// GGUF types that the kernels multiply as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BlockKind {
    Q8_0,
    Q4_0,
    Q4_1,
}

/// What products share: the device and scratch.
pub(super) struct Products<'a> {
    pub(super) runner: &'a Runner,
    pub(super) gemm: &'a mut Gemm,
    pub(super) scratch: &'a Scratch,
    pub(super) skinny: &'a Skinny,
}

/// Device memory for what products need beside their operands.
pub(super) struct Scratch {
    /// bf16: the largest of the weights in blocks, for products of many rows.
    pub(super) weights: DeviceBuffer,
    /// e4m3 `[T, K]` and f32 `[T]`: the input of products in e4m3.
    pub(super) fp8: DeviceBuffer,
    pub(super) fp8_scales: DeviceBuffer,
}

impl Weight {
    /// Where the rows begin, of a weight in bf16.
    ///
    /// # Panics
    /// If it is in another type.
    pub(super) fn bf16_address(&self) -> Address {
        match &self.format {
            Format::Bf16(values) => address(values),
            _ => panic!("the embedding is in bf16"),
        }
    }

    pub(super) const fn format_name(&self) -> &'static str {
        match &self.format {
            Format::Bf16(_) => "bf16",
            Format::Fp8 { .. } => "fp8",
            Format::Blocks { kind: BlockKind::Q8_0, .. } => "q8_0",
            Format::Blocks { kind: BlockKind::Q4_0, .. } => "q4_0",
            Format::Blocks { kind: BlockKind::Q4_1, .. } => "q4_1",
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        let buffers: Vec<&DeviceBuffer> = match &self.format {
            Format::Bf16(values) => vec![values],
            Format::Fp8 { values, scales, .. } => vec![values, scales],
            Format::Blocks { values, scales, mins, .. } => [values, scales].into_iter().chain(mins).collect(),
        };
        buffers.into_iter().map(|buffer| buffer.bytes() as u64).sum()
    }

    /// Values of bf16 scratch that products of many rows take.
    pub(super) fn scratch_values(&self) -> usize {
        match self.format {
            Format::Blocks { .. } | Format::Fp8 { is_multiplied: false, .. } => {
                self.out_features * self.in_features
            }
            _ => 0,
        }
    }

    /// Whether its products of many rows take inputs in e4m3.
    pub(super) fn is_fp8(&self) -> bool {
        matches!(self.format, Format::Fp8 { is_multiplied: true, .. })
    }

    /// Queues `y` bf16 `[rows, N]` = the layer of `x` bf16 `[rows, K]`.
    pub(super) fn multiply(
        &self,
        products: &mut Products<'_>,
        rows: usize,
        x: &DeviceBuffer,
        y: &DeviceBuffer,
    ) -> Result<(), CudaError> {
        if !self.skinny(products, Epilogue::StoreBf16, rows, self.out_features, x, y)? {
            if rows <= MAX_GEMV_TOKENS {
                self.gemv(products.runner, Epilogue::StoreBf16, rows, self.out_features, x, y)?;
            } else {
                self.gemm(products, rows, x, y)?;
            }
        }
        self.add_bias(products.runner, rows, y)
    }

    /// Queues `y` f32 `[rows, N]` = the layer of `x`, for a weight in bf16 without a bias: the LM head.
    pub(super) fn multiply_f32(
        &self,
        products: &mut Products<'_>,
        rows: usize,
        x: &DeviceBuffer,
        y: &DeviceBuffer,
    ) -> Result<(), CudaError> {
        let (n, k) = (self.out_features, self.in_features);
        if rows <= MAX_GEMV_TOKENS {
            return self.gemv(products.runner, Epilogue::StoreF32, rows, n, x, y);
        }
        let Format::Bf16(values) = &self.format else { panic!("the LM head is in bf16") };
        let (x, y) = (x.slice::<bf16>(0, rows * k), y.slice::<f32>(0, rows * n));
        products.gemm.run((rows, n, k), x, values.as_slice(), y)
    }

    /// Queues `hidden` f32 `[rows, N]` += the layer of `x`, if that goes without a detour; whether it does. If not,
    /// [`Weight::multiply`] and an addition do.
    pub(super) fn add(
        &self,
        products: &mut Products<'_>,
        rows: usize,
        x: &DeviceBuffer,
        hidden: &DeviceBuffer,
    ) -> Result<bool, CudaError> {
        if !self.skinny(products, Epilogue::AddF32, rows, self.out_features, x, hidden)? {
            if rows > MAX_GEMV_TOKENS {
                return Ok(false);
            }
            self.gemv(products.runner, Epilogue::AddF32, rows, self.out_features, x, hidden)?;
        }
        if let Some(bias) = &self.bias {
            let (hidden, bias) = (address(hidden), address(bias));
            products.runner.launch(&launcher::add_bias_f32(hidden, bias, rows, self.out_features))?;
        }
        Ok(true)
    }

    /// Queues `gated` bf16 `[rows, N / 2]` = silu(gate) · up of the layer of `x`, whose first half of rows are gates; by way of
    /// `gate_up` bf16 `[rows, N]` if it takes two launches.
    pub(super) fn swiglu(
        &self,
        products: &mut Products<'_>,
        rows: usize,
        x: &DeviceBuffer,
        gate_up: &DeviceBuffer,
        gated: &DeviceBuffer,
    ) -> Result<(), CudaError> {
        let width = self.out_features / 2;
        if self.bias.is_none() {
            if self.skinny(products, Epilogue::SwiGlu, rows, width, x, gated)? {
                return Ok(());
            }
            if rows <= MAX_GEMV_TOKENS {
                return self.gemv(products.runner, Epilogue::SwiGlu, rows, width, x, gated);
            }
        }
        self.multiply(products, rows, x, gate_up)?;
        products.runner.launch(&launcher::silu_mul(address(gated), address(gate_up), rows, width))
    }

    /// Adds the shapes of its products of so many rows.
    pub(super) fn shapes(&self, rows: &[usize], to: &mut Vec<GemmShape>) {
        let types = if self.is_fp8() { GemmTypes::Fp8RowsToBf16 } else { GemmTypes::Bf16ToBf16 };
        to.extend(rows.iter().map(|&m| self.shape(m, types)));
    }

    /// The same for products into f32.
    pub(super) fn shapes_f32(&self, rows: &[usize], to: &mut Vec<GemmShape>) {
        to.extend(rows.iter().map(|&m| self.shape(m, GemmTypes::Bf16ToF32)));
    }

    fn shape(&self, m: usize, types: GemmTypes) -> GemmShape {
        GemmShape { m, n: self.out_features, k: self.in_features, types }
    }

    /// Queues a product by the skinny kernel, if that is the best for it; whether it is.
    fn skinny(
        &self,
        products: &Products<'_>,
        epilogue: Epilogue,
        rows: usize,
        num_columns: usize,
        x: &DeviceBuffer,
        y: &DeviceBuffer,
    ) -> Result<bool, CudaError> {
        let Some(splits) = products.skinny.choice(self, epilogue, rows) else { return Ok(false) };
        let product = Product { num_tokens: rows, num_columns, size: self.in_features };
        let (x, y) = (address(x), address(y));
        products.runner.launch(&launcher::skinny_gemm(y, x, self.weights(), epilogue, product, splits))?;
        Ok(true)
    }

    fn gemv(
        &self,
        runner: &Runner,
        epilogue: Epilogue,
        rows: usize,
        num_columns: usize,
        x: &DeviceBuffer,
        y: &DeviceBuffer,
    ) -> Result<(), CudaError> {
        let product = Product { num_tokens: rows, num_columns, size: self.in_features };
        runner.launch(&launcher::gemv(address(y), address(x), self.weights(), epilogue, product))
    }

    fn gemm(
        &self,
        products: &mut Products<'_>,
        rows: usize,
        x: &DeviceBuffer,
        y: &DeviceBuffer,
    ) -> Result<(), CudaError> {
        let (n, k) = (self.out_features, self.in_features);
        let Products { runner, gemm, scratch, .. } = products;
        let out = y.slice::<bf16>(0, rows * n);
        let inputs = x.slice::<bf16>(0, rows * k);
        match &self.format {
            Format::Bf16(values) => gemm.run((rows, n, k), inputs, values.as_slice(), out),
            Format::Blocks { .. } | Format::Fp8 { is_multiplied: false, .. } => {
                runner.launch(&launcher::dequantize(address(&scratch.weights), self.weights(), n, k))?;
                gemm.run((rows, n, k), inputs, scratch.weights.slice(0, n * k), out)
            }
            Format::Fp8 { values, scales, .. } => {
                let (to, to_scales) = (address(&scratch.fp8), address(&scratch.fp8_scales));
                runner.launch(&launcher::quantize_fp8(to, to_scales, address(x), rows, k))?;
                let scales =
                    Fp8Scales::PerRow { x: scratch.fp8_scales.slice(0, rows), w: scales.slice(0, n) };
                gemm.run_fp8((rows, n, k), scratch.fp8.slice(0, rows * k), values.as_slice(), out, scales)
            }
        }
    }

    fn add_bias(&self, runner: &Runner, rows: usize, y: &DeviceBuffer) -> Result<(), CudaError> {
        match &self.bias {
            Some(bias) => {
                runner.launch(&launcher::add_bias_bf16(address(y), address(bias), rows, self.out_features))
            }
            None => Ok(()),
        }
    }

    pub(super) fn weights(&self) -> Weights {
        match &self.format {
            Format::Bf16(values) => Weights::Bf16 { values: address(values) },
            Format::Fp8 { values, scales, .. } => {
                Weights::Fp8 { values: address(values), scales: address(scales) }
            }
            Format::Blocks { kind, values, scales, mins } => {
                let (values, scales) = (address(values), address(scales));
                match (kind, mins) {
                    (BlockKind::Q8_0, _) => Weights::Q8 { values, scales },
                    (BlockKind::Q4_0, _) => Weights::Q4_0 { values, scales },
                    (BlockKind::Q4_1, Some(mins)) => Weights::Q4_1 { values, scales, mins: address(mins) },
                    (BlockKind::Q4_1, None) => unreachable!("Q4_1 is loaded with its mins"),
                }
            }
        }
    }
}
