//! Functions of lanes, and reductions whose order depends on the length alone.

use super::{LANES, Lanes};

/// `e^x` within two units in the last place for normal results; below `e^-87` it stays there, NaN stays NaN.
///
/// # Safety
/// As the methods of [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn exp<L: Lanes>(x: L) -> L {
    // SAFETY: the caller's contract.
    unsafe {
        // The bound comes first, so that a NaN, the second operand, passes.
        let x = L::splat(88.37).min(L::splat(-87.33).max(x));
        let n = x.mul(L::splat(std::f32::consts::LOG2_E)).round();
        // ln 2 in two parts: the first has few bits, so that its product with n is exact.
        let r = n.mul_add(L::splat(-0.693_359_4), x);
        let r = n.mul_add(L::splat(2.121_944_4e-4), r);
        let mut p = L::splat(1.987_569_1e-4);
        p = p.mul_add(r, L::splat(1.398_199_9e-3));
        p = p.mul_add(r, L::splat(8.333_452e-3));
        p = p.mul_add(r, L::splat(4.166_579_6e-2));
        p = p.mul_add(r, L::splat(1.666_666_5e-1));
        p = p.mul_add(r, L::splat(0.5));
        let p = p.mul_add(r.mul(r), r.add(L::splat(1.0)));
        p.scale(n)
    }
}

/// `gate / (1 + e^-gate) * up`.
///
/// # Safety
/// As the methods of [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn silu_mul<L: Lanes>(gate: L, up: L) -> L {
    // SAFETY: the caller's contract.
    unsafe {
        let e = exp(L::splat(0.0).sub(gate));
        gate.div(L::splat(1.0).add(e)).mul(up)
    }
}

/// The sum of the squares of `x[..len]`.
///
/// # Safety
/// As the methods of [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn sum_of_squares<L: Lanes>(x: *const f32, len: usize) -> f32 {
    // SAFETY: the caller's contract; every load lies in the first `len` elements.
    unsafe {
        let mut sums = [L::splat(0.0); 4];
        let mut at = 0;
        while at + 4 * LANES <= len {
            for i in 0..4 {
                let x = L::load(x.add(at + i * LANES));
                sums[i] = x.mul_add(x, sums[i]);
            }
            at += 4 * LANES;
        }
        while at < len {
            let x = L::load_part(x.add(at), (len - at).min(LANES));
            sums[0] = x.mul_add(x, sums[0]);
            at += LANES;
        }
        sums[0].add(sums[1]).add(sums[2].add(sums[3])).reduce_add()
    }
}

/// `out = x * rsqrt(mean(x^2) + eps) * weight` for `len` elements; `x` and `out` may be the same.
///
/// # Safety
/// As the methods of [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn rms_norm<L: Lanes>(x: *const f32, weight: *const f32, eps: f32, out: *mut f32, len: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        let mean = sum_of_squares::<L>(x, len) / len as f32;
        let scale = L::splat(1.0 / (mean + eps).sqrt());
        let mut at = 0;
        while at < len {
            let count = (len - at).min(LANES);
            let x = L::load_part(x.add(at), count).mul(scale);
            x.mul(L::load_part(weight.add(at), count)).store_part(out.add(at), count);
            at += LANES;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::form::Form;
    use crate::simd::{Body, dispatch};

    struct Exp([f32; LANES]);

    impl Body for Exp {
        type Output = [f32; LANES];
        #[inline(always)]
        unsafe fn run<L: Lanes>(self) -> [f32; LANES] {
            // SAFETY: the array has sixteen elements.
            unsafe { exp(L::load(self.0.as_ptr())).to_array() }
        }
    }

    #[test]
    fn exp_is_close_everywhere_and_keeps_nan() {
        for form in Form::available() {
            let mut worst = 0f64;
            for step in 0..200_000 {
                let x = -87.0 + step as f32 * (175.0 / 200_000.0);
                let got = f64::from(dispatch(form, Exp([x; LANES]))[7]);
                worst = worst.max((got / f64::from(x).exp() - 1.0).abs());
            }
            assert!(worst < 2.5e-7, "{form}: relative error {worst:e}");
            assert!(dispatch(form, Exp([f32::NAN; LANES]))[0].is_nan(), "{form}");
            assert_eq!(dispatch(form, Exp([0.0; LANES])), [1.0; LANES], "{form}");
            assert!(dispatch(form, Exp([f32::NEG_INFINITY; LANES]))[3] < 2e-38, "{form}");
        }
    }

    struct Transpose([[f32; LANES]; LANES]);

    impl Body for Transpose {
        type Output = [[f32; LANES]; LANES];
        #[inline(always)]
        unsafe fn run<L: Lanes>(self) -> Self::Output {
            // SAFETY: every row has sixteen elements.
            unsafe {
                let mut rows = [L::splat(0.0); LANES];
                for i in 0..LANES {
                    rows[i] = L::load(self.0[i].as_ptr());
                }
                L::transpose(&mut rows);
                let mut out = [[0.0; LANES]; LANES];
                for i in 0..LANES {
                    out[i] = rows[i].keep(0, LANES, L::splat(0.0)).to_array();
                }
                out
            }
        }
    }

    #[test]
    fn transpose_swaps_rows_and_lanes() {
        let rows: [[f32; LANES]; LANES] = std::array::from_fn(|i| std::array::from_fn(|j| (i * 100 + j) as f32));
        for form in Form::available() {
            let turned = dispatch(form, Transpose(rows));
            for i in 0..LANES {
                for j in 0..LANES {
                    assert_eq!(turned[i][j], rows[j][i], "{form} {i} {j}");
                }
            }
        }
    }
}
