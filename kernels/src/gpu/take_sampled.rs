use crate::gpu::rows::int;
use crate::gpu::{Address, DeviceSamples, GpuError, Launch};

/// Puts tokens that are sampled on the device where the next step reads its own, with no way over the host.
///
/// `ids` and `sources` are u32 `[n]` on the device; row `i` takes token `sources[i]` of all samples, counted over the
/// parts, and keeps its id where the source is none of them. A token that could not be sampled counts as 0.
pub fn take_sampled(samples: &[DeviceSamples], sources: Address, ids: Address, n: usize) -> Result<(), GpuError> {
    let launch = Launch { kernel: "take_sampled", grid: [int(n.div_ceil(128)), 1, 1], block: 128, shared: 0 };
    let mut first = 0;
    for part in samples.iter().filter(|part| !part.is_empty()) {
        let (words, len) = (part.place().0, part.len());
        let [row_words, from, count, n] = [part.row_words(), first, len, n].map(int);
        let args = [ids.into(), sources.into(), words.into(), row_words.into(), from.into(), count.into(), n.into()];
        // SAFETY: `n` words are at both addresses, by the caller's word; only rows of the samples are read.
        unsafe { part.gpu().launch(launch, &args)? };
        first += len;
    }
    Ok(())
}
