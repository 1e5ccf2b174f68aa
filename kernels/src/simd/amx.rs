//! Matrix tiles (Intel AMX): eight registers of sixteen rows of 64 bytes, and the product of two of them.
//!
//! The standard library's intrinsics are not stable, hence assembly. Compilers never allocate tile registers, so a tile
//! keeps its content from one of these functions to the next as long as nothing else is called that uses them.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Rows of a tile.
pub(crate) const TILE_ROWS: usize = 16;

/// bf16 elements of a tile's row, which a product reads as sixteen pairs.
pub(crate) const TILE_DEPTH: usize = 32;

/// Whether the processor has bf16 tiles, and the system lets this process use them.
pub(crate) fn is_granted() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    *GRANTED.get_or_init(|| {
        const BF16: u32 = 1 << 22;
        const TILES: u32 = 1 << 24;
        __cpuid_count(7, 0).edx & (BF16 | TILES) == BF16 | TILES && ask()
    })
}

/// Linux grants the tile state to a process on request: `Documentation/arch/x86/xstate.rst`.
#[cfg(target_os = "linux")]
fn ask() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call reads nothing of ours; where the kernel does not know it, it fails.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn ask() -> bool {
    false
}

/// All eight tiles in their full shape on this thread; given back on drop, so that an idle thread has no state to save.
pub(crate) struct Tiles(PhantomData<*const ()>);

#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static FULL: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

impl Tiles {
    /// # Safety
    /// [`is_granted`].
    #[inline(always)]
    pub(crate) unsafe fn take() -> Tiles {
        // SAFETY: the caller's contract; the configuration is 64 bytes of a valid palette.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &FULL, options(nostack, preserves_flags, readonly)) };
        Tiles(PhantomData)
    }

    /// Zeroes a tile.
    #[inline(always)]
    fn zero<const TILE: u8>(&self) {
        // SAFETY: the tiles are configured while `self` lives.
        unsafe { asm!("tilezero tmm{}", const TILE, options(nostack, preserves_flags, nomem)) }
    }

    /// Zeroes tiles 0 to 3, where products are summed.
    #[inline(always)]
    pub(crate) fn zero_sums(&self) {
        self.zero::<0>();
        self.zero::<1>();
        self.zero::<2>();
        self.zero::<3>();
    }

    /// Loads sixteen rows of 64 bytes, `stride` bytes apart.
    ///
    /// # Safety
    /// All rows are readable.
    #[inline(always)]
    pub(crate) unsafe fn load<const TILE: u8, T>(&self, from: *const T, stride: usize) {
        // SAFETY: the caller's contract; the tiles are configured while `self` lives.
        unsafe {
            asm!("tileloadd tmm{}, [{} + {}*1]", const TILE, in(reg) from, in(reg) stride,
                options(nostack, preserves_flags, readonly));
        }
    }

    /// Stores sixteen rows of 64 bytes, `stride` bytes apart.
    ///
    /// # Safety
    /// All rows are writable.
    #[inline(always)]
    pub(crate) unsafe fn store<const TILE: u8>(&self, to: *mut f32, stride: usize) {
        // SAFETY: the caller's contract; the tiles are configured while `self` lives.
        unsafe {
            asm!("tilestored [{} + {}*1], tmm{}", in(reg) to, in(reg) stride, const TILE,
                options(nostack, preserves_flags));
        }
    }

    /// Stores tiles 0 to 3 as two by two, in rows `stride` elements apart.
    ///
    /// # Safety
    /// Thirty-two rows of thirty-two elements are writable.
    #[inline(always)]
    pub(crate) unsafe fn store_square(&self, to: *mut f32, stride: usize) {
        const COLUMNS: usize = 16;
        // SAFETY: the caller's contract.
        unsafe {
            let below = to.add(TILE_ROWS * stride);
            self.store::<0>(to, 4 * stride);
            self.store::<1>(to.add(COLUMNS), 4 * stride);
            self.store::<2>(below, 4 * stride);
            self.store::<3>(below.add(COLUMNS), 4 * stride);
        }
    }

    /// `SUM[m][n] += sum over k of A[m][k] * B[k / 2][n][k % 2]` for bf16 `A` and `B` and f32 `SUM`.
    ///
    /// The products of even and of odd `k` are summed apart, in order, then added to each other and to `SUM`; denormals
    /// count as zero (Intel's manual, TDPBF16PS). A row of `SUM` depends on its row of `A` alone.
    #[inline(always)]
    pub(crate) fn dot<const SUM: u8, const A: u8, const B: u8>(&self) {
        // SAFETY: the tiles are configured while `self` lives.
        unsafe {
            asm!("tdpbf16ps tmm{}, tmm{}, tmm{}", const SUM, const A, const B, options(nostack, preserves_flags, nomem));
        }
    }
}

impl Drop for Tiles {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the tiles were configured, so the processor has the instruction.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
    }
}
