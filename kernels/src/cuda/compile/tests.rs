use super::*;
use crate::stub::{Stub, build_dir, counter, in_child, in_child_with, real};

#[test]
fn every_capability_from_8_0_has_a_target_that_runs_there() {
    let name = |major, minor| Target::for_capability(major, minor).map(Target::name);
    assert_eq!((name(7, 5), name(3, 0)), (None, None));
    assert_eq!([name(8, 0), name(8, 6), name(8, 7)], [Some("sm_80"); 3]);
    assert_eq!(name(8, 9), Some("sm_89"));
    assert_eq!(name(9, 0), Some("sm_90a"));
    assert_eq!(name(10, 0), Some("sm_100a"));
    // Code for 10.0a does not run on 10.3, nor that of any 10 on 12.
    assert_eq!([name(10, 3), name(11, 0), name(12, 0), name(12, 1)], [Some("compute_89"); 4]);
    // Assembly of 8.9 knows no waiting for other launches, even where the device does.
    let waits = |major, minor| Target::for_capability(major, minor).unwrap().waits_for_launches();
    assert_eq!(
        [waits(8, 9), waits(9, 0), waits(10, 0), waits(10, 3), waits(12, 0)],
        [false, true, true, false, false]
    );
}

#[test]
fn sources_are_compiled_through_the_cache() {
    in_child((module_path!(), "sources_are_compiled_through_the_cache"), &[Stub::Nvrtc], &[], || {
        let folder = build_dir().join(format!("compile-tests/{}", std::process::id()));
        let cache = KernelCache::at(&folder);
        let compiler = Compiler::open().unwrap();
        let source = Source { name: "add.cu", prelude: "before", text: "after" };
        let compile = |source: &Source<'_>, target| compiler.compile(&cache, source, target).unwrap();
        let first = compile(&source, Target::ALL[0]);
        assert_eq!(first.origin, Origin::Compiled);
        let text = String::from_utf8(first.bytes().to_vec()).unwrap();
        assert!(text.contains("=sm_80\n#line 1 \"prelude\"\nbefore\n#line 1 \"add.cu\"\nafter"), "{text}");
        let again = compile(&source, Target::ALL[0]);
        assert_eq!((again.origin, again.bytes), (Origin::Cache, first.bytes));
        assert_eq!(compile(&source, Target::ALL[2]).origin, Origin::Compiled);
        // A line that moves from the prelude to the source is another text.
        let moved = Source { name: "add.cu", prelude: "", text: "before\nafter" };
        assert_eq!(compile(&moved, Target::ALL[0]).origin, Origin::Compiled);
        assert_eq!(counter(Stub::Nvrtc, "compiles"), 3);
        let bad = Source { name: "bad.cu", prelude: "", text: "#error here" };
        let error = compiler.compile(&cache, &bad, Target::ALL[1]).unwrap_err();
        let CudaError::Compile { source_name, target, log } = error else { panic!("{error}") };
        assert_eq!((source_name.as_str(), target.as_str()), ("bad.cu", "sm_89"));
        assert!(log.contains("stub: error: #error here"), "{log}");
        let zero = Source { name: "zero.cu", prelude: "", text: "a\0b" };
        assert!(matches!(compiler.compile(&cache, &zero, Target::ALL[1]), Err(CudaError::Compiler { .. })));
        std::fs::remove_dir_all(folder).unwrap();
    });
}

#[test]
fn the_real_nvrtc_compiles_for_every_target() {
    let Some(folder) = real("cu13", "libnvrtc.so.13") else { return };
    let test = (module_path!(), "the_real_nvrtc_compiles_for_every_target");
    in_child_with(test, &[folder], &[], || {
        let folder = build_dir().join(format!("compile-tests/real-{}", std::process::id()));
        let cache = KernelCache::at(&folder);
        let compiler = Compiler::open().unwrap();
        assert_eq!(compiler.version(), (13, 0));
        let source = Source {
            name: "add.cu",
            prelude: "#define KERNEL extern \"C\" __global__ void",
            text: "KERNEL add(int *out, const int *in, int add, int n) {\n\
                   int i = blockIdx.x * blockDim.x + threadIdx.x;\n\
                   if (i < n) out[i] = in[i] + add;\n}\n",
        };
        for target in Target::ALL {
            let image = compiler.compile(&cache, &source, target).unwrap();
            assert_eq!(image.origin, Origin::Compiled);
            assert!(image.bytes().starts_with(b"\x7fELF"), "{target}");
            let again = compiler.compile(&cache, &source, target).unwrap();
            assert_eq!((again.origin, again.bytes), (Origin::Cache, image.bytes));
        }
        let image = compiler.compile(&cache, &source, Target::for_capability(12, 0).unwrap()).unwrap();
        let text = String::from_utf8(image.bytes).unwrap();
        assert!(text.contains(".target sm_89") && text.contains("add") && text.ends_with('\0'), "{text}");
        let bad = Source { text: "KERNEL add(int *out) {\n  out[0] = nothing;\n}\n", ..source };
        let error = compiler.compile(&cache, &bad, Target::ALL[0]).unwrap_err();
        let CudaError::Compile { log, .. } = error else { panic!("{error}") };
        assert!(log.contains("add.cu(2)") && log.contains("nothing"), "{log}");
        std::fs::remove_dir_all(folder).unwrap();
    });
}
