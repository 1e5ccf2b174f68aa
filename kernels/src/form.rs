use std::fmt;
use std::sync::OnceLock;

/// Which CPU form of the kernels runs; chosen once per process.
///
/// The forms differ from each other within stated bounds; inside one form every result is bit-exact
/// whatever the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// 512-bit vectors (`avx512f`, `bw`, `vl`, `dq`).
    ///
    /// bf16 weights are widened in registers: where `vdpbf16ps` was measured (Sapphire Rapids) it does half the
    /// arithmetic of two fused products, and it flushes denormals.
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
        [Form::Avx512, Form::Avx2, Form::Scalar].into_iter().filter(|form| form.is_supported()).collect()
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

    /// The form called `avx512`, `avx2` or `scalar`.
    pub fn from_name(name: &str) -> Option<Form> {
        match name.to_ascii_lowercase().as_str() {
            "avx512" => Some(Form::Avx512),
            "avx2" => Some(Form::Avx2),
            "scalar" => Some(Form::Scalar),
            _ => None,
        }
    }

    #[cfg(target_arch = "x86_64")]
    pub(crate) fn is_supported(self) -> bool {
        match self {
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

impl fmt::Display for Form {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Form::Avx512 => "avx512",
            Form::Avx2 => "avx2",
            Form::Scalar => "scalar",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_the_scalar_form_always_runs() {
        for form in [Form::Avx512, Form::Avx2, Form::Scalar] {
            assert_eq!(Form::from_name(&form.to_string()), Some(form));
        }
        assert_eq!(Form::from_name("neon"), None);
        assert_eq!(Form::available().last(), Some(&Form::Scalar));
        assert!(Form::available().contains(&Form::current()));
    }
}
