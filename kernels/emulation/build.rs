//! Compiles the CUDA kernels as host C++.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo:rustc-check-cfg=cfg(no_kernels)");
    let kernels = Path::new("../cuda");
    println!("cargo:rerun-if-changed=../cuda");
    println!("cargo:rerun-if-changed=shim");
    let mut sources: Vec<PathBuf> = fs::read_dir(kernels)
        .expect("the kernels are there")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .include("shim")
        .include(kernels)
        .opt_level(2)
        .debug(false)
        // As the references: a sum of products is rounded twice.
        .flag("-ffp-contract=off")
        .flag("-fno-strict-aliasing")
        .flag("-U_FORTIFY_SOURCE")
        .flag("-Wno-unused-parameter")
        .flag("-Wno-unused-function")
        .flag("-Wno-unknown-pragmas")
        .flag("-x")
        .flag("c++")
        .files(sources)
        .file("shim/launch.cc")
        .link_lib_modifier("+whole-archive");
    // Whoever has a C compiler alone can still build and test the rest.
    let compiler = build.try_get_compiler();
    if compiler.is_ok_and(|compiler| compiler.to_command().arg("--version").output().is_ok()) {
        build.compile("moetrail_emulation");
    } else {
        assert!(env::var_os("CI").is_none(), "the GPU kernels cannot be tested without a C++ compiler");
        println!("cargo:warning=the GPU kernels cannot be tested without a C++ compiler");
        println!("cargo:rustc-cfg=no_kernels");
    }
}
