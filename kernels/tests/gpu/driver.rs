//! What a [`Driver`](moetrail_kernels::gpu::Driver) promises, of whichever device is tested.

use std::sync::mpsc;
use std::thread;

use moetrail_kernels::WeightDtype;
use moetrail_kernels::gpu::{
    Address, Arena, CopyKind, DeviceBuffer, DeviceMatrix, Gpu, Launch, PinnedBuffer, Pitched, Stream, cuda, embedding,
    select_rows,
};
use proptest::prelude::*;

use crate::device::{floats, gpu, is_cuda, matrix};
use crate::toss::Toss;

fn at(address: Address, first: usize, pitch: usize) -> Pitched {
    Pitched { first: address.at(first).0, pitch }
}

/// Bytes of pinned memory, from the `first`.
fn pinned(buffer: &PinnedBuffer, first: usize, pitch: usize) -> Pitched {
    Pitched { first: buffer.bytes()[first..].as_ptr() as u64, pitch }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// To the device, on it, and back, each time with other pitches; what lies between rows stays as it was.
    #[test]
    fn rows_are_copied(
        seed: u64, rows in 1usize..9, width in 1usize..70, gaps in prop::array::uniform4(0usize..9), first in 0usize..5,
    ) {
        let Some(gpu) = gpu(seed) else { return Ok(()) };
        let pitches = gaps.map(|gap| width + gap);
        let bytes = |pitch: usize| first + rows * pitch;
        let mut from = PinnedBuffer::new(&gpu, bytes(pitches[0])).unwrap();
        let mut toss = Toss::new(seed);
        from.bytes_mut().fill_with(|| toss.below(256) as u8);
        let one = DeviceBuffer::filled(&gpu, bytes(pitches[1]), 7).unwrap();
        let other = DeviceBuffer::filled(&gpu, bytes(pitches[2]), 8).unwrap();
        let mut to = PinnedBuffer::new(&gpu, bytes(pitches[3])).unwrap();
        to.bytes_mut().fill(9);
        let ends = [
            pinned(&from, first, pitches[0]),
            at(one.address(), first, pitches[1]),
            at(other.address(), first, pitches[2]),
            pinned(&to, first, pitches[3]),
        ];
        for (i, kind) in [CopyKind::ToDevice, CopyKind::OnDevice, CopyKind::ToHost].into_iter().enumerate() {
            // SAFETY: the ends are as long, and there until `finish`.
            unsafe { gpu.driver().copy(Stream::Compute, kind, ends[i + 1], ends[i], width, rows) }.unwrap();
        }
        gpu.finish(Stream::Compute).unwrap();
        let expected = |pitch: usize, between: u8| {
            let mut bytes = vec![between; bytes(pitch)];
            for row in 0..rows {
                bytes[first + row * pitch..][..width].copy_from_slice(&from.bytes()[first + row * pitches[0]..][..width]);
            }
            bytes
        };
        assert_eq!(gpu.read::<u8>(one.address(), one.bytes()).unwrap(), expected(pitches[1], 7));
        assert_eq!(gpu.read::<u8>(other.address(), other.bytes()).unwrap(), expected(pitches[2], 8));
        assert_eq!(to.bytes(), expected(pitches[3], 9));
    }

    /// A recording does nothing by itself; launched, it reads what memory holds then.
    #[test]
    fn recordings_read_anew(seed: u64, n in 1usize..5, width in 1usize..40, launches in 1usize..4) {
        let Some(gpu) = gpu(seed) else { return Ok(()) };
        let (arena, mut toss) = (Arena::new(&gpu), Toss::new(seed));
        let values: Vec<f32> = toss.values(6 * width);
        let x = floats(&arena, &values, width);
        let ids = DeviceBuffer::filled(&gpu, n * 4, 0).unwrap();
        let copied = DeviceBuffer::filled(&gpu, n * width * 4, 0).unwrap();
        let driver = gpu.driver();
        driver.begin_graph().unwrap();
        let out = select_rows(&arena, &x, None, ids.address(), n).unwrap();
        let (to, from) = (at(copied.address(), 0, 0), at(out.address(), 0, 0));
        // SAFETY: both are as long and live on.
        unsafe { driver.copy(Stream::Compute, CopyKind::OnDevice, to, from, copied.bytes(), 1) }.unwrap();
        // SAFETY: as above.
        unsafe { driver.fill(Stream::Compute, out.address(), 0xff, n * width * 4) }.unwrap();
        let graph = driver.end_graph().unwrap();
        assert_eq!(gpu.read::<f32>(copied.address(), n * width).unwrap(), vec![0.0; n * width]);
        for _ in 0..launches {
            let picked: Vec<u32> = (0..n).map(|_| toss.below(6) as u32).collect();
            let new = DeviceBuffer::of(&gpu, &picked).unwrap();
            let (to, from) = (at(ids.address(), 0, 0), at(new.address(), 0, 0));
            // SAFETY: as above.
            unsafe { driver.copy(Stream::Compute, CopyKind::OnDevice, to, from, ids.bytes(), 1) }.unwrap();
            driver.launch_graph(graph).unwrap();
            let expected: Vec<f32> = picked.iter().flat_map(|&id| values[id as usize * width..][..width].to_vec()).collect();
            assert_eq!(gpu.read::<f32>(copied.address(), n * width).unwrap(), expected);
            assert!(gpu.read::<f32>(out.address(), n * width).unwrap().iter().all(|value| value.is_nan()));
        }
        driver.drop_graph(graph);
    }

    /// Streams wait where they are told to: every copy sees the value of its turn.
    #[test]
    fn streams_wait(seed: u64, turns in 1usize..6, bytes in 1usize..5000) {
        let Some(gpu) = gpu(seed) else { return Ok(()) };
        let driver = gpu.driver();
        let memory = DeviceBuffer::filled(&gpu, bytes, 0).unwrap();
        let hosts: Vec<PinnedBuffer> = (0..turns).map(|_| PinnedBuffer::new(&gpu, bytes).unwrap()).collect();
        let mut copied = Vec::new();
        for (turn, host) in hosts.iter().enumerate() {
            // SAFETY: the buffers live until `finish`.
            unsafe { driver.fill(Stream::Compute, memory.address(), turn as u8 + 1, bytes) }.unwrap();
            let filled = driver.record(Stream::Compute).unwrap();
            driver.wait(Stream::Copy, filled).unwrap();
            driver.forget(filled);
            let (to, from) = (pinned(host, 0, 0), at(memory.address(), 0, 0));
            // SAFETY: as above.
            unsafe { driver.copy(Stream::Copy, CopyKind::ToHost, to, from, bytes, 1) }.unwrap();
            let event = driver.record(Stream::Copy).unwrap();
            driver.wait(Stream::Compute, event).unwrap();
            copied.push(event);
        }
        for (turn, (host, &event)) in hosts.iter().zip(&copied).enumerate() {
            driver.finish(event).unwrap();
            assert!(driver.has_happened(event).unwrap());
            assert!(host.bytes().iter().all(|&byte| byte == turn as u8 + 1));
        }
        gpu.finish(Stream::Compute).unwrap();
        copied.into_iter().for_each(|event| driver.forget(event));
    }

    /// One thread loads weights and gives memory back again and again, while another records and launches: the weights are
    /// those that were stored, and a recording holds what its own thread issued, and nothing else.
    #[test]
    fn weights_are_loaded_beside_recordings(
        seed: u64, n in 1usize..5, width in 1usize..70, turns in 1usize..5,
        dtype in prop::sample::select(vec![WeightDtype::F32, WeightDtype::BF16, WeightDtype::F16]),
    ) {
        let Some(gpu) = gpu(seed) else { return Ok(()) };
        let (arena, mut toss) = (Arena::new(&gpu), Toss::new(seed));
        let values: Vec<f32> = toss.values(6 * width);
        let x = floats(&arena, &values, width);
        let ids = DeviceBuffer::filled(&gpu, n * 4, 0).unwrap();
        let driver = gpu.driver();
        thread::scope(|scope| {
            // Nobody loads the next before this one is taken.
            let (load, loaded) = mpsc::sync_channel(0);
            let loading = gpu.for_loading();
            scope.spawn(move || {
                let mut toss = Toss::new(!seed);
                loop {
                    let (rows, cols) = (1 + toss.below(40), 1 + toss.below(90));
                    drop(DeviceBuffer::filled(&loading, rows, 1).unwrap());
                    let (weights, values) = matrix(&loading, &mut toss, rows, cols, dtype);
                    loading.finish(Stream::Load).unwrap();
                    if load.send((weights, values)).is_err() {
                        return;
                    }
                }
            });
            let check = |(weights, values): (DeviceMatrix, Vec<f32>)| {
                let all: Vec<u32> = (0..weights.out_features() as u32).collect();
                let all = DeviceBuffer::of(&gpu, &all).unwrap();
                let rows = embedding(&arena, &weights, all.address(), weights.out_features()).unwrap();
                assert_eq!(rows.to_host(0, rows.len()).unwrap(), values);
            };
            for turn in 0..turns {
                driver.begin_graph().unwrap();
                let out = select_rows(&arena, &x, None, ids.address(), n).unwrap();
                // The second of them is loaded within the recording from beginning to end.
                let within = [loaded.recv().unwrap(), loaded.recv().unwrap()];
                drop(DeviceBuffer::new(&gpu, 1 + turn).unwrap());
                let graph = driver.end_graph().unwrap();
                let picked: Vec<u32> = (0..n).map(|_| toss.below(6) as u32).collect();
                gpu.upload(ids.address(), &picked.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<_>>()).unwrap();
                driver.launch_graph(graph).unwrap();
                let expected: Vec<f32> = picked.iter().flat_map(|&id| values[id as usize * width..][..width].to_vec()).collect();
                assert_eq!(out.to_host(0, n).unwrap(), expected);
                within.into_iter().for_each(check);
                check(loaded.recv().unwrap());
                driver.drop_graph(graph);
            }
            drop(loaded);
        });
    }
}

/// What is loaded lies behind what was loaded before, and not behind what is computed: `for_loading` is a stream of its
/// own, also where streams advance as late as they may.
#[test]
fn loading_waits_for_no_step() {
    let Some(gpu) = gpu(0) else { return };
    let memory = DeviceBuffer::filled(&gpu, 64, 1).unwrap();
    gpu.finish(Stream::Compute).unwrap();
    let event = gpu.driver().record(Stream::Compute).unwrap();
    let loading = gpu.for_loading();
    loading.upload(memory.address().at(16), &[2; 48]).unwrap();
    assert_eq!(loading.read::<u8>(memory.address(), 48).unwrap(), [[1; 16], [2; 16], [2; 16]].concat());
    // Nothing but a wait for it moves the emulation's other stream.
    assert!(is_cuda() || !gpu.driver().has_happened(event).unwrap());
    gpu.driver().forget(event);
    assert_eq!((loading.stream(), gpu.stream()), (Stream::Load, Stream::Compute));
    assert!(gpu.clone().with_deterministic(true).for_loading().is_deterministic());
}

/// Where there is no device, or nothing in this build that could use it, that is said in a line.
#[test]
fn what_is_missing_is_said() {
    for answer in [cuda::devices().map(|devices| devices.len()), cuda::open(0).map(|_| 1)] {
        match answer {
            Ok(count) => assert_ne!(count, 0),
            Err(error) => {
                let line = error.to_string();
                assert!(line.starts_with("GPU: ") && !line.contains('\n'), "{line}");
                assert!(cfg!(feature = "cuda") || line.contains("--features cuda"), "{line}");
            }
        }
    }
    assert!(cuda::open(usize::MAX).is_err());
}

/// The driver says what is wrong with a launch, and goes on.
#[test]
fn wrong_launches_are_refused() {
    // The emulation looks at a launch only when it runs, and then stops.
    let Some(gpu) = gpu(0).filter(|_| is_cuda()) else { return };
    let memory = DeviceBuffer::filled(&gpu, 4096, 0).unwrap();
    let right = Launch { kernel: "select_rows", grid: [1, 1, 1], block: 32, shared: 0 };
    let args = [memory.address().into(), memory.address().at(1024).into(), Address::NULL.into()];
    let args = [&args[..], &[memory.address().at(2048).into(), 4u32.into()]].concat();
    let launch = |gpu: &Gpu, launch: Launch, args: &[_]| {
        // SAFETY: the kernel reads one row id, 0, and copies one row of 4 floats.
        unsafe { gpu.driver().launch(Stream::Compute, launch, args) }.map_err(|error| error.to_string())
    };
    launch(&gpu, right, &args).unwrap();
    let wrong = [
        (Launch { kernel: "no_such_kernel", ..right }, &args[..], "no_such_kernel"),
        (Launch { block: 2048, ..right }, &args[..], "block 2048"),
        (Launch { grid: [1, 0, 1], ..right }, &args[..], "grid [1, 0, 1]"),
        (Launch { shared: 1 << 20, ..right }, &args[..], "shared 1048576"),
        (right, &args[..4], "4 arguments"),
    ];
    for (wrong, args, says) in wrong {
        let line = launch(&gpu, wrong, args).expect_err(says);
        assert!(line.contains(says) && line.contains(wrong.kernel) && !line.contains('\n'), "{line}");
    }
    launch(&gpu, Launch { shared: 100 << 10, ..right }, &args).unwrap();
    gpu.finish(Stream::Compute).unwrap();
    let line = gpu.driver().allocate(1 << 50).expect_err("more than any device has").to_string();
    assert!(line.contains("CUDA_ERROR_OUT_OF_MEMORY") && line.contains("MiB are free"), "{line}");
    // In a recording, what cannot be recorded is refused, and the rest of it stands.
    gpu.driver().begin_graph().unwrap();
    assert!(gpu.driver().record(Stream::Compute).is_err() && gpu.driver().begin_graph().is_err());
    launch(&gpu, right, &args).unwrap();
    let graph = gpu.driver().end_graph().unwrap();
    gpu.driver().launch_graph(graph).unwrap();
    gpu.finish(Stream::Compute).unwrap();
    gpu.driver().drop_graph(graph);
}
