//! With the feature `cuda`, compiles the kernels of `cuda/` with nvcc, one fatbin a file, and lists them for `gpu/cuda`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::{env, fs};

/// Machine code for what we tune for (8.x runs that of 8.0), and PTX, which the driver compiles for newer chips.
const TARGETS: [&str; 2] =
    ["-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90a,code=sm_90a"];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    println!("cargo::rerun-if-changed=cuda");
    for variable in ["NVCC", "CUDA_HOME", "MOETRAIL_NVCC_STUB"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    match compile_all() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={message}");
            ExitCode::FAILURE
        }
    }
}

fn compile_all() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo names it"));
    let files = |extension: &str| {
        let mut files: Vec<PathBuf> = fs::read_dir("cuda")
            .expect("the kernels are there")
            .map(|entry| entry.expect("readable").path())
            .filter(|path| path.extension().is_some_and(|found| found == extension))
            .collect();
        files.sort();
        files
    };
    let sources = files("cu");
    // `cargo clippy` asks for the files, not for what is in them.
    let compiler = match env::var_os("MOETRAIL_NVCC_STUB").is_some_and(|value| !value.is_empty() && value != "0") {
        true => None,
        false => Some(Compiler::find()?),
    };
    let headers: String = files("cuh").iter().map(|path| read(path)).collect();
    // The largest first.
    let mut todo = sources.clone();
    todo.sort_by_key(|path| fs::metadata(path).map_or(0, |about| about.len()));
    let (todo, failed) = (Mutex::new(todo), Mutex::new(Vec::new()));
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    std::thread::scope(|scope| {
        for _ in 0..sources.len().min(jobs) {
            scope.spawn(|| {
                while let Some(source) = { todo.lock().expect("no thread panics").pop() } {
                    if let Err(message) = compile(compiler.as_ref(), &source, &headers, &out) {
                        failed.lock().expect("no thread panics").push(message);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().expect("no thread panicked");
    if !failed.is_empty() {
        return Err(failed.join(" "));
    }
    let version = compiler.map_or(String::new(), |compiler| format!("{}.{}", compiler.version.0, compiler.version.1));
    let mut list = format!(
        "pub(super) const COMPILER: &str = {version:?};\npub(super) const FILES: &[(&str, &Image<[u8]>)] = &[\n"
    );
    for source in &sources {
        let stem = stem(source);
        list += &format!("({stem:?}, &Image(*include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{stem}.fatbin\")))),\n");
    }
    fs::write(out.join("images.rs"), list + "];\n").map_err(|error| format!("images.rs: {error}"))
}

fn compile(compiler: Option<&Compiler>, source: &Path, headers: &str, out: &Path) -> Result<(), String> {
    let stem = stem(source);
    let (fatbin, inputs) = (out.join(format!("{stem}.fatbin")), out.join(format!("{stem}.inputs")));
    let Some(compiler) = compiler else {
        _ = fs::remove_file(&inputs);
        return fs::write(&fatbin, b"").map_err(|error| format!("{}: {error}", fatbin.display()));
    };
    // An edit costs the files that it touches.
    let all_inputs = format!("{compiler:?} {TARGETS:?}\n{headers}\n{}", read(source));
    if fatbin.exists() && fs::read_to_string(&inputs).is_ok_and(|last| last == all_inputs) {
        return Ok(());
    }
    _ = fs::remove_file(&inputs);
    let mut command = Command::new(&compiler.path);
    command.args(["-std=c++17", "-O3", "-fatbin", "-o"]).arg(&fatbin).arg(source).args(TARGETS);
    if compiler.version >= (12, 8) {
        command.arg("--compress-mode=size");
    }
    let output = command.output().map_err(|error| format!("{:?}: {error}", compiler.path))?;
    if !output.status.success() {
        // The whole of it is for the eyes; an error of cargo's is one line.
        eprintln!(
            "{command:?}\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        return Err(format!("nvcc does not compile {} ({}).", source.display(), output.status));
    }
    fs::write(&inputs, all_inputs).map_err(|error| format!("{}: {error}", inputs.display()))
}

#[derive(Debug)]
struct Compiler {
    path: OsString,
    version: (u32, u32),
}

impl Compiler {
    /// `$NVCC`, or that of `$CUDA_HOME`, or the one on the path, or where the toolkit's installer puts it.
    fn find() -> Result<Compiler, String> {
        if let Some(named) = env::var_os("NVCC").filter(|value| !value.is_empty()) {
            return Compiler::at(named.clone()).ok_or(format!("$NVCC is {named:?}, which is no nvcc that runs"));
        }
        let home = env::var_os("CUDA_HOME").filter(|value| !value.is_empty());
        let in_home = home.map(|home| Path::new(&home).join("bin/nvcc").into_os_string());
        let elsewhere = ["nvcc".into(), "/usr/local/cuda/bin/nvcc".into()];
        in_home.into_iter().chain(elsewhere).find_map(Compiler::at).ok_or_else(|| {
            "the feature `cuda` compiles GPU kernels and needs nvcc, which is neither $NVCC, in $CUDA_HOME/bin, on the \
             path, nor in /usr/local/cuda/bin. Install NVIDIA's CUDA toolkit (12.0 or newer) and a C++ compiler, or only \
             its compiler from PyPI: `kernels/cuda/install-toolkit PREFIX; source PREFIX/env.sh`"
                .to_owned()
        })
    }

    /// What runs under this name, with the version that it tells.
    fn at(path: OsString) -> Option<Compiler> {
        let output = Command::new(&path).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.split("release ").nth(1)?.split(',').next()?;
        let (major, minor) = version.split_once('.')?;
        Some(Compiler { path, version: (major.parse().ok()?, minor.parse().ok()?) })
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn stem(path: &Path) -> &str {
    path.file_stem().and_then(|stem| stem.to_str()).expect("file names are ASCII")
}
