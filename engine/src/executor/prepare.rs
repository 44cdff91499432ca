//! Flattens a step plan into the arrays that a model takes. Pure: no clock, no choice, no device.

use tandem_models::ForwardBatch;

use crate::step_plan::{PlannedSequence, StepPlan};

/// Fills `batch` from `plan`; its vectors keep their memory from step to step.
pub(crate) fn prepare(plan: &StepPlan, batch: &mut ForwardBatch) {
    clear(batch);
    batch.cu_seqlens.push(0);
    batch.block_table_offsets.push(0);
    batch.block_copies.extend(plan.block_copies.iter().map(|copy| (copy.source, copy.destination)));
    for sequence in &plan.sequences {
        append(sequence, plan.block_size, batch);
    }
}

fn clear(batch: &mut ForwardBatch) {
    batch.token_ids.clear();
    batch.pending_tokens.clear();
    batch.positions.clear();
    batch.cu_seqlens.clear();
    batch.context_lens.clear();
    batch.block_tables.clear();
    batch.block_table_offsets.clear();
    batch.slot_mapping.clear();
    batch.logits_rows.clear();
    batch.block_copies.clear();
}

fn append(sequence: &PlannedSequence, block_size: u32, batch: &mut ForwardBatch) {
    let first_row = batch.token_ids.len() as u32;
    let positions = sequence.context_len..sequence.context_len + sequence.token_ids.len() as u32;
    let slot = |position: u32| {
        sequence.block_table[(position / block_size) as usize] * block_size + position % block_size
    };

    batch.token_ids.extend_from_slice(&sequence.token_ids);
    batch.pending_tokens.extend(sequence.pending_row.map(|row| (first_row, row)));
    batch.slot_mapping.extend(positions.clone().map(slot));
    batch.positions.extend(positions);
    batch.context_lens.push(sequence.context_len);
    batch.block_tables.extend_from_slice(&sequence.block_table);
    batch.logits_rows.extend(sequence.logits_rows.iter().map(|row| first_row + row));
    batch.cu_seqlens.push(batch.token_ids.len() as u32);
    batch.block_table_offsets.push(batch.block_tables.len() as u32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step_plan::BlockCopy;

    #[test]
    fn a_chunk_and_a_decode_share_one_batch() {
        let chunk = PlannedSequence {
            context_len: 14,
            token_ids: vec![5, 6, 7, 8],
            block_table: vec![9, 2, 4],
            logits_rows: vec![],
            ..PlannedSequence::default()
        };
        let decode = PlannedSequence {
            context_len: 16,
            token_ids: vec![0],
            pending_row: Some(6),
            block_table: vec![1, 7],
            logits_rows: vec![0],
            ..PlannedSequence::default()
        };
        let copies = vec![BlockCopy { source: 1, destination: 7 }];
        let plan = StepPlan { step: 0, block_size: 16, sequences: vec![chunk, decode], block_copies: copies };
        let expected = ForwardBatch {
            token_ids: vec![5, 6, 7, 8, 0],
            pending_tokens: vec![(4, 6)],
            positions: vec![14, 15, 16, 17, 16],
            cu_seqlens: vec![0, 4, 5],
            context_lens: vec![14, 16],
            block_tables: vec![9, 2, 4, 1, 7],
            block_table_offsets: vec![0, 3, 5],
            slot_mapping: vec![9 * 16 + 14, 9 * 16 + 15, 2 * 16, 2 * 16 + 1, 7 * 16],
            logits_rows: vec![4],
            block_copies: vec![(1, 7)],
        };
        let mut batch = ForwardBatch::default();
        for _ in 0..2 {
            prepare(&plan, &mut batch);
            assert_eq!(batch, expected);
        }
    }
}
