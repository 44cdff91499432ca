//! Checks of sums over ranks: all ranks' launches run on one device, side by side.

use half::bf16;

use super::super::launcher::{self, Group, Reduced};
use super::{Buffer, Case, Checks, Element, wide};

pub(super) fn all_reduce(checks: &mut Checks<'_>) {
    // More than one turn of all blocks, and less than one block has threads.
    let groups_of_ranks = [(2, [8, 4104, 9000, 8]), (4, [8200, 64, 24, 64]), (8, [576, 576, 4096, 576])];
    // One after the other, the first rank would wait for the second for ever.
    let possible = if checks.launcher.has_streams() { &groups_of_ranks[..] } else { &[] };
    for &(world_size, counts) in possible {
        checks.case(format!("one_shot_all_reduce_f32 of {world_size} ranks, {counts:?}"), |case| {
            let values = |case: &mut Case<'_>, n| case.random.f32s(n, 1.0);
            ranks_case(case, world_size, counts, Reduced::F32, values, |values| {
                values.iter().map(|&x| f64::from(x)).collect()
            })
        });
        checks.case(format!("one_shot_all_reduce_bf16 of {world_size} ranks, {counts:?}"), |case| {
            let values = |case: &mut Case<'_>, n| case.random.bf16s(n, 1.0);
            ranks_case(case, world_size, counts, Reduced::Bf16, values, |values: &[bf16]| wide(values))
        });
    }
    checks.case("one_shot_all_reduce that is aborted".into(), |case| {
        let group = groups(case, 2, 1024, 3, 1)?[0];
        let input = case.input(&[1f32; 64])?;
        case.launch(launcher::one_shot_all_reduce(input.address, input.address, Reduced::F32, 64, group))
    });
}

fn groups(
    case: &mut Case<'_>,
    world_size: usize,
    capacity: usize,
    num_blocks: usize,
    abort: u32,
) -> Result<Vec<Group>, String> {
    let (mut buffers, mut flags) = (Vec::new(), Vec::new());
    for _ in 0..world_size {
        buffers.push(case.output::<u8>(2 * capacity)?.address);
        flags.push(case.input(&vec![0u32; num_blocks * world_size])?.address);
    }
    (0..world_size)
        .map(|rank| {
            Ok(Group {
                rank,
                world_size,
                buffers: case.input(&buffers)?.address,
                capacity,
                num_blocks,
                flags: case.input(&flags)?.address,
                epochs: case.input(&vec![0u32; 2 * num_blocks])?.address,
                abort: case.input(&[abort])?.address,
            })
        })
        .collect()
}

fn ranks_case<T: Element + PartialEq>(
    case: &mut Case<'_>,
    world_size: usize,
    counts: [usize; 4],
    reduced: Reduced,
    random: impl Fn(&mut Case<'_>, usize) -> Vec<T>,
    widen: impl Fn(&[T]) -> Vec<f64>,
) -> Result<(), String> {
    let capacity = counts.iter().max().unwrap_or(&0) * reduced.bytes();
    let groups = groups(case, world_size, capacity, 1 + 4 / world_size, 0)?;
    let mut streams = vec![Vec::new(); world_size];
    let mut sums = Vec::new();
    for count in counts {
        let mut expected = vec![0.0; count];
        let mut outs: Vec<Buffer<T>> = Vec::new();
        for (group, stream) in groups.iter().zip(&mut streams) {
            let values = random(case, count);
            expected.iter_mut().zip(widen(&values)).for_each(|(sum, x)| *sum += x);
            let (out, input) = (case.output(count)?, case.input(&values)?.address);
            stream.push(launcher::one_shot_all_reduce(out.address, input, reduced, count, *group));
            outs.push(out);
        }
        sums.push((expected, outs));
    }
    // No rank waits for another between its launches, so fast ones are ahead.
    case.launcher.launch_together(&streams)?;
    for (expected, outs) in sums {
        let first = case.read(outs[0])?;
        for &out in &outs[1..] {
            case.expect_equal("another rank's sum", out, &first)?;
        }
        let tolerance = if reduced == Reduced::Bf16 { 4e-3 } else { 1e-5 };
        case.expect("sum", widen(&first).into_iter().map(|x| x as f32), &expected, tolerance)?;
    }
    Ok(())
}
