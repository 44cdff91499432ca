//! Checks of what puts the columns of ranks together.

use super::super::launcher::{self, ColumnParts};
use super::Checks;

pub(super) fn columns(checks: &mut Checks<'_>) {
    for (num_rows, starts) in [(1, vec![0, 5]), (3, vec![0, 16, 32, 500]), (7, vec![0, 300, 301, 777, 1024])]
    {
        checks.case(format!("join_columns {num_rows} rows of {starts:?}"), |case| {
            let (world_size, num_columns) = (starts.len() - 1, starts[starts.len() - 1]);
            let widths: Vec<usize> = starts.windows(2).map(|pair| pair[1] - pair[0]).collect();
            let part_values = num_rows * widths.iter().max().expect("ranks") + 3;
            let parts: Vec<f32> = case.random.f32s(world_size * part_values, 1.0);
            let mut expected = vec![0.0; num_rows * num_columns];
            for (rank, &width) in widths.iter().enumerate() {
                for row in 0..num_rows {
                    let from = rank * part_values + row * width;
                    let to = row * num_columns + starts[rank];
                    expected[to..to + width].copy_from_slice(&parts[from..from + width]);
                }
            }
            let out = case.output::<f32>(num_rows * num_columns)?;
            let starts: Vec<i32> = starts.iter().map(|&start| start as i32).collect();
            let (parts, starts) = (case.input(&parts)?.address, case.input(&starts)?.address);
            let of = ColumnParts { parts, starts, part_values, world_size };
            case.launch(launcher::join_columns(out.address, of, num_rows, num_columns))?;
            case.expect_equal("out", out, &expected)
        });
    }
}
