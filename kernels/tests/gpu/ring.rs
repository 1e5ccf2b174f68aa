use std::collections::VecDeque;

use moetrail_kernels::WeightDtype;
use moetrail_kernels::gpu::{DeviceBuffer, DeviceKv, DeviceRing, Gpu, RowStaging, StagedRows, Stream};
use proptest::prelude::*;

use crate::device::gpu;
use crate::toss::Toss;

/// A ring and what it should hold.
struct Model {
    ring: DeviceRing,
    bytes: Vec<u8>,
}

impl Model {
    /// Random rows.
    fn new(gpu: &Gpu, toss: &mut Toss, num_slots: usize, moe_layers: usize, top_k: usize, wide: bool) -> Model {
        let ring = DeviceRing::new(gpu, num_slots, moe_layers, top_k, wide).unwrap();
        let mut model = Model { bytes: vec![0; ring.bytes()], ring };
        assert_eq!(model.bytes.len(), num_slots * moe_layers * top_k * if wide { 2 } else { 1 });
        for slot in 0..num_slots {
            model.write(toss, slot, 1);
        }
        model
    }

    /// Overwrites block `block` of `block_size` slots.
    fn write(&mut self, toss: &mut Toss, block: usize, block_size: usize) {
        let len = block_size * self.ring.row_bytes();
        let to = &mut self.bytes[block * len..][..len];
        to.iter_mut().for_each(|byte| *byte = toss.below(256) as u8);
        self.ring.write_block(block as u32, block_size, to).unwrap();
    }

    fn rows(&self, slots: &[u32]) -> Vec<u8> {
        let len = self.ring.row_bytes();
        slots.iter().flat_map(|&slot| self.bytes[slot as usize * len..][..len].to_vec()).collect()
    }

    fn check(&self) {
        let mut all = vec![0; self.bytes.len()];
        self.ring.read_block(0, self.ring.num_slots(), &mut all).unwrap();
        assert_eq!(all, self.bytes);
    }
}

fn slots(toss: &mut Toss, limit: usize, n: usize) -> Vec<u32> {
    (0..n).map(|_| toss.below(limit) as u32).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn rows_are_gathered(seed: u64, n in 1usize..200, moe_layers in 1usize..7, k in 1usize..9, wide: bool) {
        let Some(gpu) = gpu(seed) else { return Ok(()) };
        let mut toss = Toss::new(seed);
        let model = Model::new(&gpu, &mut toss, 40, moe_layers, k, wide);
        let slots = slots(&mut toss, 40, n);
        let listed = DeviceBuffer::of(&gpu, &slots).unwrap();
        // A row more, to see that it stays as it was.
        let row = model.ring.row_bytes();
        let out = DeviceBuffer::filled(&gpu, (n + 1) * row, 0xa5).unwrap();
        model.ring.gather(listed.address(), n, out.address()).unwrap();
        let mut expected = model.rows(&slots);
        expected.resize((n + 1) * row, 0xa5);
        assert_eq!(gpu.read::<u8>(out.address(), (n + 1) * row).unwrap(), expected);
    }

    #[test]
    fn blocks_are_copied_read_and_written(seed: u64, block_size in 1usize..5, wide: bool) {
        let Some(gpu) = gpu(seed) else { return Ok(()) };
        let mut toss = Toss::new(seed);
        let mut model = Model::new(&gpu, &mut toss, 6 * block_size, 3, 2, wide);
        let len = block_size * model.ring.row_bytes();
        for _ in 0..8 {
            let [from, to] = [toss.below(6), toss.below(6)];
            match toss.below(2) {
                0 => model.write(&mut toss, to, block_size),
                _ => {
                    model.ring.copy_block(from as u32, to as u32, block_size).unwrap();
                    model.bytes.copy_within(from * len..(from + 1) * len, to * len);
                }
            }
            let mut block = vec![0; len];
            model.ring.read_block(to as u32, block_size, &mut block).unwrap();
            assert_eq!(block, model.bytes[to * len..][..len]);
        }
        model.check();
        model.ring.fill(0x5a).unwrap();
        model.bytes.fill(0x5a);
        model.check();
    }

    /// Blocks of cache and ring move out, are given away, and come back elsewhere. Nobody waits before the end, so what
    /// decides is the order in which all of it was issued.
    #[test]
    fn blocks_wait_in_host_memory(
        seed: u64, late: bool, block_size in 1usize..5, layers in 1usize..4, wide: bool, moves in 1usize..40,
    ) {
        const BLOCKS: usize = 5;
        const HOST: usize = 3;
        let Some(gpu) = gpu(if late { 0 } else { seed }) else { return Ok(()) };
        let mut toss = Toss::new(seed);
        let ring = DeviceRing::new(&gpu, BLOCKS * block_size, layers, 2, wide).unwrap();
        let kv = DeviceKv::new(&gpu, layers, BLOCKS, block_size, 2, 8, WeightDtype::BF16).unwrap();
        let mut rows_out = ring.pinned_blocks(HOST, block_size).unwrap();
        let mut kv_out = kv.pinned_blocks(HOST).unwrap();
        let row_len = rows_out.block_bytes();
        // All bytes of a block are one number.
        let fill = |block: usize, value: u8| {
            let of_kv = kv.bytes() / (2 * layers) / BLOCKS;
            let places = (0..layers).flat_map(|layer| [kv.k(layer), kv.v(layer)]).map(|place| (place, of_kv));
            for (place, len) in places.chain([(ring.address(), row_len)]) {
                // SAFETY: a block of the cache or the ring.
                unsafe { gpu.driver().fill(Stream::Compute, place.at(block * len), value, len) }.unwrap();
            }
        };
        let (mut here, mut out): ([u8; BLOCKS], [u8; HOST]) = ([1, 2, 3, 4, 5], [0; HOST]);
        for (block, value) in here.into_iter().enumerate() {
            fill(block, value);
        }
        for turn in 0..moves {
            let (block, host) = (toss.below(BLOCKS), toss.below(HOST));
            if toss.below(2) == 0 {
                kv.move_out(block as u32, &mut kv_out, host as u32).unwrap();
                ring.move_out(block as u32, &mut rows_out, host as u32).unwrap();
                out[host] = here[block];
                // Its next owner writes at once.
                here[block] = turn as u8 + 100;
                fill(block, here[block]);
            } else {
                kv.move_in(&kv_out, host as u32, block as u32).unwrap();
                ring.move_in(&rows_out, host as u32, block as u32).unwrap();
                here[block] = out[host];
            }
        }
        // Given back while copies to it may be still to happen.
        drop((kv_out, rows_out));
        let (mut rows, mut bytes) = (vec![0; row_len], vec![0; kv.bytes() / BLOCKS]);
        for (block, value) in here.iter().enumerate() {
            ring.read_block(block as u32, block_size, &mut rows).unwrap();
            kv.read_block(block as u32, &mut bytes).unwrap();
            assert!(rows.iter().chain(&bytes).all(|byte| byte == value), "block {block}: {value}, {rows:?}");
        }
    }
}

/// A drain that nobody has landed yet, and what it must bring.
struct Outstanding {
    rows: StagedRows,
    expected: Vec<u8>,
}

impl Outstanding {
    fn land(mut self, way: usize) {
        match way {
            0 => assert_eq!(self.rows.land().unwrap(), self.expected),
            1 => assert_eq!(self.rows.into_bytes().unwrap(), self.expected),
            2 => {
                let mut bytes = vec![1, 2, 3];
                self.rows.append_to(&mut bytes).unwrap();
                assert_eq!(bytes[..3], [1, 2, 3]);
                assert_eq!(bytes[3..], self.expected);
            }
            // Twice, as one may.
            _ => {
                self.rows.land().unwrap();
                assert!(self.rows.has_landed().unwrap());
                assert_eq!(self.rows.land().unwrap(), self.expected);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Drains, each followed at once by launches that overwrite its slots, through staging memory that holds a few of
    /// them at most; landed in any order, or never.
    #[test]
    fn drained_rows_are_those_of_their_moment(
        seed: u64,
        late: bool,
        moe_layers in 1usize..5,
        k in 1usize..9,
        wide: bool,
        room in 1usize..30,
    ) {
        let Some(gpu) = gpu(if late { 0 } else { seed }) else { return Ok(()) };
        let mut toss = Toss::new(seed);
        let num_slots = 32;
        let mut model = Model::new(&gpu, &mut toss, num_slots, moe_layers, k, wide);
        let row = model.ring.row_bytes();
        let staging = RowStaging::new(&gpu, 256 + room * (row + 4)).unwrap();
        // What the next steps write, on the device. Nothing below waits but what is landed: no upload, no buffer given back.
        let all = DeviceBuffer::of(&gpu, &(0..num_slots as u32).collect::<Vec<u32>>()).unwrap();
        let mut steps: VecDeque<DeviceRing> = VecDeque::new();
        let mut step_bytes = VecDeque::new();
        for _ in 0..3 {
            let model = Model::new(&gpu, &mut toss, num_slots, moe_layers, k, wide);
            steps.push_back(model.ring);
            step_bytes.push_back(model.bytes);
        }
        let mut outstanding: Vec<Outstanding> = Vec::new();
        let mut bytes = 0;
        for _ in 0..30 {
            match toss.below(6) {
                0..3 => {
                    let n = toss.below(2 * room + 2);
                    let slots = slots(&mut toss, num_slots, n);
                    let expected = model.rows(&slots);
                    bytes += expected.len() as u64;
                    let rows = staging.drain(&model.ring, &slots).unwrap();
                    assert_eq!(staging.bytes_issued(), bytes);
                    outstanding.push(Outstanding { rows, expected });
                    // The next owner of these slots.
                    let (from, content) = (steps.pop_front().unwrap(), step_bytes.pop_front().unwrap());
                    from.gather(all.address(), num_slots, model.ring.address()).unwrap();
                    model.bytes.clone_from(&content);
                    steps.push_back(from);
                    step_bytes.push_back(content);
                }
                3 | 4 if !outstanding.is_empty() => {
                    let at = toss.below(outstanding.len());
                    outstanding.swap_remove(at).land(toss.below(4));
                }
                5 if !outstanding.is_empty() => {
                    let at = toss.below(outstanding.len());
                    drop(outstanding.swap_remove(at));
                }
                _ => {}
            }
        }
        while !outstanding.is_empty() {
            let at = toss.below(outstanding.len());
            outstanding.swap_remove(at).land(toss.below(4));
        }
        gpu.finish(Stream::Copy).unwrap();
        assert_eq!(staging.bytes_held().unwrap(), [0, 0]);
        model.check();
    }
}

/// Rows may outlive the staging that they came from, or never be asked for.
#[test]
fn rows_outlive_their_staging() {
    for seed in 0..20 {
        let Some(gpu) = gpu(seed) else { return };
        let mut toss = Toss::new(seed);
        let model = Model::new(&gpu, &mut toss, 8, 2, 8, false);
        let staging = RowStaging::new(&gpu, 4096).unwrap();
        let mut rows = staging.drain(&model.ring, &[7, 7, 0]).unwrap();
        let unwanted = staging.drain(&model.ring, &[1]).unwrap();
        drop(staging);
        assert_eq!(rows.land().unwrap(), model.rows(&[7, 7, 0]));
        drop((rows, unwanted));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(gpu) = gpu(1) else { return };
    let ring = DeviceRing::new(&gpu, 8, 4, 8, true).unwrap();
    let staging = RowStaging::new(&gpu, 4096).unwrap();
    let error = staging.drain(&ring, &[0, 8]).unwrap_err().to_string();
    assert!(error.contains("slot 8 is not below 8"), "{error}");
    assert!(staging.drain(&ring, &[]).unwrap().into_bytes().unwrap().is_empty());
    let small = RowStaging::new(&gpu, 128).unwrap();
    let error = small.drain(&ring, &[0]).unwrap_err().to_string();
    assert!(error.contains("no room for a row"), "{error}");
    assert_eq!((staging.bytes_issued(), small.bytes_issued()), (0, 0));
}
