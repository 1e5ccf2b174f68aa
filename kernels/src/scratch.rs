use crate::buffer::{Plain, elements_mut};

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A buffer that a thread keeps from call to call: 64-byte aligned, only ever growing, its content left over.
#[derive(Default)]
pub(crate) struct Scratch(Vec<Line>);

impl Scratch {
    pub(crate) const fn new() -> Scratch {
        Scratch(Vec::new())
    }

    /// Room for `len` elements of any value.
    pub(crate) fn take<T: Plain>(&mut self, len: usize) -> &mut [T] {
        let lines = (len * size_of::<T>()).div_ceil(64);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0; 64]));
        }
        // SAFETY: lines are plain bytes without padding.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast::<u8>(), lines * 64) };
        &mut elements_mut(bytes)[..len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_aligned_and_keeps_what_was_written() {
        let mut scratch = Scratch::new();
        scratch.take::<u16>(5).copy_from_slice(&[1, 2, 3, 4, 5]);
        assert_eq!(scratch.take::<u16>(4), [1, 2, 3, 4]);
        let floats = scratch.take::<f32>(100);
        assert_eq!((floats.len(), floats.as_ptr() as usize % 64), (100, 0));
    }
}
