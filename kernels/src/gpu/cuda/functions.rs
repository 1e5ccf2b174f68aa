//! The compiled kernels, and how they are found by name.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::ptr::null_mut;
use std::sync::RwLock;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::sys;
use sys::CUfunction_attribute::{self, *};
use sys::CUresult;

use super::call::check;
use crate::gpu::{Arg, GpuError, Launch};

/// Bytes where the driver may read them as words.
#[repr(C, align(64))]
struct Image<B: ?Sized>(B);

/// What build.rs compiled: `COMPILER`, a version, and `FILES`, fatbins by the name of their source.
mod images {
    use super::Image;
    include!(concat!(env!("OUT_DIR"), "/images.rs"));
}

/// The kernels of one file, loaded into a context.
#[derive(Debug)]
struct Module {
    raw: sys::CUmodule,
    name: &'static str,
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: nobody uses its functions any more.
        _ = unsafe { sys::cuModuleUnload(self.raw) };
    }
}

/// A kernel.
#[derive(Debug)]
struct Function {
    raw: sys::CUfunction,
    /// Parameters, where the driver can tell.
    params: Option<usize>,
    /// Threads of a block that its registers allow.
    most_threads: u32,
    /// Bytes of dynamic shared memory that a launch may have now.
    shared: AtomicU32,
    /// Bytes that it may have once the driver was told.
    most_shared: u32,
}

/// The kernels of a context.
#[derive(Debug)]
pub(super) struct Functions {
    by_name: RwLock<HashMap<&'static str, Function>>,
    modules: Vec<Module>,
    /// Bytes of shared memory that a block may have.
    most_shared: u32,
    /// Version of CUDA that the driver supports.
    driver: u32,
}

impl Functions {
    /// Loads all files into this thread's context. On chips that have no machine code in them the driver compiles, which
    /// takes seconds the first time.
    pub(super) fn load(most_shared: u32, driver: u32) -> Result<Functions, GpuError> {
        if images::COMPILER.is_empty() {
            return Err(GpuError::new("CUDA", "built without kernels, by MOETRAIL_NVCC_STUB"));
        }
        let mut modules = Vec::new();
        for &(name, image) in images::FILES {
            let mut raw = null_mut();
            let pointer: *const c_void = image.0.as_ptr().cast();
            // SAFETY: the image is a whole fatbin, which tells its own size.
            let answer = unsafe { sys::cuModuleLoadData(&mut raw, pointer) };
            check(answer, format_args!("cuModuleLoadData {name}.cu")).map_err(|mut error| {
                let (major, minor) = (driver / 1000, driver % 1000 / 10);
                let versions = format!("compiled with CUDA {}, driver for CUDA {major}.{minor}", images::COMPILER);
                error.message += &format!(" ({versions})");
                error
            })?;
            modules.push(Module { raw, name });
        }
        Ok(Functions { by_name: RwLock::default(), modules, most_shared, driver })
    }

    /// Launches a kernel.
    ///
    /// # Safety
    /// As [`Driver::launch`](crate::gpu::Driver::launch); the context is this thread's.
    pub(super) unsafe fn launch(&self, stream: sys::CUstream, launch: Launch, args: &[Arg]) -> Result<(), GpuError> {
        {
            let by_name = self.by_name.read().unwrap_or_else(|poison| poison.into_inner());
            if let Some(function) = by_name.get(launch.kernel) {
                // SAFETY: the caller's contract.
                return unsafe { function.launch(stream, launch, args) };
            }
        }
        let function = self.find(launch.kernel)?;
        let mut by_name = self.by_name.write().unwrap_or_else(|poison| poison.into_inner());
        // SAFETY: the caller's contract.
        unsafe { by_name.entry(launch.kernel).or_insert(function).launch(stream, launch, args) }
    }

    fn find(&self, kernel: &'static str) -> Result<Function, GpuError> {
        let name =
            CString::new(kernel).map_err(|error| GpuError::new(format!("kernel {kernel:?}"), error.to_string()))?;
        for module in &self.modules {
            let mut raw = null_mut();
            // SAFETY: it writes one pointer; the module is there as long as `self`.
            let answer = unsafe { sys::cuModuleGetFunction(&mut raw, module.raw, name.as_ptr()) };
            if answer == CUresult::CUDA_ERROR_NOT_FOUND {
                continue;
            }
            check(answer, format_args!("cuModuleGetFunction {kernel} of {}.cu", module.name))?;
            return self.look_at(raw, kernel);
        }
        let names: Vec<_> = self.modules.iter().map(|module| module.name).collect();
        Err(GpuError::new(format!("kernel {kernel}"), format!("it is in none of {names:?}")))
    }

    fn look_at(&self, raw: sys::CUfunction, kernel: &str) -> Result<Function, GpuError> {
        let attribute = |which: CUfunction_attribute| {
            let mut value = 0;
            // SAFETY: it writes one int.
            let answer = unsafe { sys::cuFuncGetAttribute(&mut value, which, raw) };
            check(answer, format_args!("cuFuncGetAttribute {which:?} of {kernel}")).map(|()| value as u32)
        };
        let fixed = attribute(CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        Ok(Function {
            raw,
            params: self.params(raw, kernel)?,
            most_threads: attribute(CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
            shared: AtomicU32::new(attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)?),
            most_shared: self.most_shared.saturating_sub(fixed),
        })
    }

    /// How many parameters a kernel has.
    fn params(&self, raw: sys::CUfunction, kernel: &str) -> Result<Option<usize>, GpuError> {
        // Older drivers' libraries do not have the function.
        if self.driver < 12040 {
            return Ok(None);
        }
        for index in 0.. {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: it writes two sizes.
            match unsafe { sys::cuFuncGetParamInfo(raw, index, &mut offset, &mut size) } {
                CUresult::CUDA_SUCCESS if size > size_of::<Arg>() => {
                    let message = format!("parameter {index} has {size} bytes");
                    return Err(GpuError::new(format!("kernel {kernel}"), message));
                }
                CUresult::CUDA_SUCCESS => {}
                // There is no such parameter.
                CUresult::CUDA_ERROR_INVALID_VALUE => return Ok(Some(index)),
                _ => break,
            }
        }
        Ok(None)
    }
}

impl Function {
    /// # Safety
    /// As [`Functions::launch`].
    unsafe fn launch(&self, stream: sys::CUstream, launch: Launch, args: &[Arg]) -> Result<(), GpuError> {
        let call = |name: &str| {
            let Launch { kernel, grid, block, shared } = launch;
            format!("{name} {kernel} with grid {grid:?}, block {block}, shared {shared}")
        };
        let refuse = |message: String| Err(GpuError::new(call("launch"), message));
        if let Some(params) = self.params
            && params != args.len()
        {
            return refuse(format!("{} arguments for {params} parameters", args.len()));
        }
        if launch.block > self.most_threads {
            return refuse(format!("at most {} threads, which its registers allow", self.most_threads));
        }
        if launch.shared > self.shared.load(Ordering::Relaxed) {
            if launch.shared > self.most_shared {
                return refuse(format!("at most {} bytes of dynamic shared memory", self.most_shared));
            }
            let (which, most) = (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, self.most_shared as i32);
            // SAFETY: the function is one of this context.
            check(unsafe { sys::cuFuncSetAttribute(self.raw, which, most) }, call("cuFuncSetAttribute"))?;
            self.shared.store(self.most_shared, Ordering::Relaxed);
        }
        let mut pointers = [null_mut(); MOST_ARGS];
        if args.len() > MOST_ARGS {
            return refuse(format!("more than {MOST_ARGS} arguments"));
        }
        for (pointer, arg) in pointers.iter_mut().zip(args) {
            *pointer = std::ptr::from_ref(arg).cast_mut().cast::<c_void>();
        }
        let (Launch { grid: [x, y, z], block, shared, .. }, extra) = (launch, null_mut());
        // SAFETY: the caller vouches for the arguments, which are read before the call returns: as many bytes of each as
        // its parameter has, which are no more than it is long.
        let answer = unsafe {
            sys::cuLaunchKernel(self.raw, x, y, z, block, 1, 1, shared, stream, pointers.as_mut_ptr(), extra)
        };
        match answer {
            CUresult::CUDA_SUCCESS => Ok(()),
            answer => check(answer, call("cuLaunchKernel")),
        }
    }
}

/// More than any kernel takes.
const MOST_ARGS: usize = 64;
