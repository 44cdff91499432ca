# The two commands of a newcomer are `make serve` and `make test`; the others are parts of them.

PYTHON ?= python3
PORT ?= 8000
# What a machine without a lock on versions may not change: builds use Cargo.lock as it is.
CARGO_FLAGS ?= --locked

.PHONY: serve model build test kernels soak fmt lint

serve: model build
	exec ./target/release/tandem serve "$$($(PYTHON) scripts/fetch-model.py)" --served-model-name smollm2-135m-instruct --port $(PORT)

model:
	@$(PYTHON) scripts/fetch-model.py > /dev/null

build:
	cargo build --release $(CARGO_FLAGS) --package tandem-server --bin tandem

test: fmt lint model kernels
	cargo test --workspace $(CARGO_FLAGS)

# Compiles the CUDA kernels for every architecture; needs no GPU.
kernels:
	@$(PYTHON) scripts/check-kernels.py

# The faults of a group ten times each, and its protocol from many more seeds.
soak: model
	cargo build $(CARGO_FLAGS) --package tandem-server
	TANDEM_SIM_SEEDS=20000 cargo test $(CARGO_FLAGS) --package tandem-engine --lib simulation
	TANDEM_SOAK=10 cargo test $(CARGO_FLAGS) --package tandem-tests --test group_faults -- --nocapture

fmt:
	cargo fmt --all --check

lint:
	cargo clippy --workspace --all-targets $(CARGO_FLAGS) -- --deny warnings
