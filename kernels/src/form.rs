use std::fmt;
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use crate::simd::amx;

/// Which CPU form of the kernels runs; chosen once per process.
///
/// The forms differ from each other within stated bounds; inside one form every result is bit-exact
/// whatever the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// As [`Form::Avx512Bf16`], with products of bf16 pairs on matrix tiles (`amx_bf16`).
    Amx,
    /// As [`Form::Avx512`], with products of bf16 pairs by `vdpbf16ps`, and of quantised weights by `vpdpbusd`.
    ///
    /// Twice the arithmetic of fused products on AMD's Zen 4; half of it on Intel's Sapphire Rapids.
    Avx512Bf16,
    /// 512-bit vectors (`avx512f`, `bw`, `vl`, `dq`); bf16 weights are widened in registers.
    Avx512,
    /// 256-bit vectors (`avx2`, `fma`, `f16c`).
    Avx2,
    /// Portable code.
    Scalar,
}

static CURRENT: OnceLock<Form> = OnceLock::new();

impl Form {
    /// The fastest form this machine can run.
    pub fn detect() -> Form {
        Form::available()[0]
    }

    /// Every form this machine can run, fastest first; `Scalar` is always the last.
    pub fn available() -> Vec<Form> {
        let wide = match is_intel() {
            true => [Form::Avx512, Form::Avx512Bf16],
            false => [Form::Avx512Bf16, Form::Avx512],
        };
        let all = [Form::Amx, wide[0], wide[1], Form::Avx2, Form::Scalar];
        all.into_iter().filter(|form| form.is_supported()).collect()
    }

    /// The form in use: the one that was set, else `MOETRAIL_CPU_FORM` where this machine can run
    /// it, else the fastest.
    pub fn current() -> Form {
        *CURRENT.get_or_init(|| {
            let forced = std::env::var("MOETRAIL_CPU_FORM").ok().and_then(|name| Form::from_name(&name));
            forced.filter(|form| form.is_supported()).unwrap_or_else(Form::detect)
        })
    }

    /// Chooses the form before first use; false when it is already chosen or cannot run here.
    pub fn set(form: Form) -> bool {
        form.is_supported() && CURRENT.set(form).is_ok()
    }

    /// Every form, whether or not this machine has it.
    pub const ALL: [Form; 5] = [Form::Amx, Form::Avx512Bf16, Form::Avx512, Form::Avx2, Form::Scalar];

    /// The form called `amx`, `avx512bf16`, `avx512`, `avx2` or `scalar`.
    pub fn from_name(name: &str) -> Option<Form> {
        Form::ALL.into_iter().find(|form| form.name() == name.to_ascii_lowercase())
    }

    fn name(self) -> &'static str {
        match self {
            Form::Amx => "amx",
            Form::Avx512Bf16 => "avx512bf16",
            Form::Avx512 => "avx512",
            Form::Avx2 => "avx2",
            Form::Scalar => "scalar",
        }
    }

    #[cfg(target_arch = "x86_64")]
    pub(crate) fn is_supported(self) -> bool {
        match self {
            Form::Amx => Form::Avx512Bf16.is_supported() && amx::is_granted(),
            Form::Avx512Bf16 => {
                Form::Avx512.is_supported()
                    && is_x86_feature_detected!("avx512bf16")
                    && is_x86_feature_detected!("avx512vnni")
            }
            Form::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && Form::Avx2.is_supported()
            }
            Form::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            Form::Scalar => true,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn is_supported(self) -> bool {
        self == Form::Scalar
    }
}

/// Whether the processor is Intel's. Asked once: under a hypervisor the instruction takes as long as a kernel.
#[cfg(target_arch = "x86_64")]
pub(crate) fn is_intel() -> bool {
    static INTEL: OnceLock<bool> = OnceLock::new();
    *INTEL.get_or_init(|| {
        let leaf = std::arch::x86_64::__cpuid(0);
        [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
    })
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn is_intel() -> bool {
    false
}

impl fmt::Display for Form {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_the_scalar_form_always_runs() {
        for form in Form::ALL {
            assert_eq!(Form::from_name(&form.to_string()), Some(form));
        }
        assert_eq!(Form::from_name("neon"), None);
        assert_eq!(Form::available().last(), Some(&Form::Scalar));
        assert!(Form::available().contains(&Form::current()));
    }
}
