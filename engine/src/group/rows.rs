//! Sampling rows on their way to the rank that draws.

use tandem_wire::codec::{DecodeError, Decoder, Encoder};

use crate::penalties::TokenUse;
use crate::sample_row::{Draw, NoiseKey, OwnedDraw, OwnedKind, OwnedRow, RowKind, SampleRow};

pub(super) fn encode_rows(rows: &[SampleRow<'_>], out: &mut Encoder) {
    out.list(rows, |out, row| {
        out.u32(row.logits_row).option(row.logprobs, |out, top| out.u32(top as u32));
        match &row.kind {
            RowKind::Score { target } => out.bool(false).u32(*target),
            RowKind::Sample(draw) => encode_draw(out.bool(true), draw),
        }
    });
}

pub(super) fn decode_rows(input: &mut Decoder<'_>) -> Result<Vec<OwnedRow>, DecodeError> {
    input.list(10, |input| {
        let logits_row = input.u32()?;
        let logprobs = input.option(Decoder::u32)?;
        let kind = match input.bool()? {
            false => OwnedKind::Score { target: input.u32()? },
            true => OwnedKind::Sample(Box::new(decode_draw(input)?)),
        };
        Ok(OwnedRow { logits_row, kind, logprobs })
    })
}

fn encode_draw<'e>(out: &'e mut Encoder, draw: &Draw<'_>) -> &'e mut Encoder {
    out.u64(draw.key.seed).u32(draw.key.choice).u32(draw.key.position);
    out.list(draw.used_tokens, |out, used| out.u32(used.token).bool(used.in_prompt).u32(used.output_count));
    out.f32(draw.repetition_penalty).f32(draw.presence_penalty).f32(draw.frequency_penalty);
    out.list(draw.logit_bias, |out, &(token, bias)| out.u32(token).f32(bias));
    out.option(draw.allowed_token_ids, encode_set);
    encode_set(out, draw.banned_token_ids);
    out.f32(draw.temperature).u32(draw.top_k).f32(draw.top_p).f32(draw.min_p)
}

fn decode_draw(input: &mut Decoder<'_>) -> Result<OwnedDraw, DecodeError> {
    Ok(OwnedDraw {
        key: NoiseKey { seed: input.u64()?, choice: input.u32()?, position: input.u32()? },
        used_tokens: input.list(9, |input| {
            Ok(TokenUse { token: input.u32()?, in_prompt: input.bool()?, output_count: input.u32()? })
        })?,
        repetition_penalty: input.f32()?,
        presence_penalty: input.f32()?,
        frequency_penalty: input.f32()?,
        logit_bias: input.list(8, |input| Ok((input.u32()?, input.f32()?)))?,
        allowed_token_ids: input.option(decode_set)?,
        banned_token_ids: decode_set(input)?,
        temperature: input.f32()?,
        top_k: input.u32()?,
        top_p: input.f32()?,
        min_p: input.f32()?,
    })
}

/// Token ids whose order and number say nothing: one after another, or a bit for each id up to the highest, whichever is shorter. So
/// a step stays far below the longest message however long these lists of its requests are.
fn encode_set<'e>(out: &'e mut Encoder, ids: &[u32]) -> &'e mut Encoder {
    let bytes = ids.iter().max().map_or(0, |highest| *highest as usize / 8 + 1);
    if bytes >= size_of_val(ids) {
        return out.bool(false).u32s(ids);
    }
    let mut bits = vec![0u8; bytes];
    ids.iter().for_each(|id| bits[*id as usize / 8] |= 1 << (id % 8));
    out.bool(true).bytes(&bits)
}

/// Far above any vocabulary: a set takes 32 times as much memory when it is taken apart.
const MAX_SET_BYTES: usize = 1 << 20;

fn decode_set(input: &mut Decoder<'_>) -> Result<Vec<u32>, DecodeError> {
    if !input.bool()? {
        return input.u32s();
    }
    let bits = input.bytes()?;
    if bits.len() > MAX_SET_BYTES {
        return Err(DecodeError::Unknown { what: "length of a set of ids", value: bits.len() as u64 });
    }
    let ids_of = |(byte, bits): (usize, &u8)| {
        let bits = *bits;
        (0..8).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| byte as u32 * 8 + bit)
    };
    Ok(bits.iter().enumerate().flat_map(ids_of).collect())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// One row of each kind.
    pub(in crate::group) fn some_rows() -> Vec<OwnedRow> {
        let draw = OwnedDraw {
            key: NoiseKey { seed: u64::MAX, choice: 2, position: 77 },
            used_tokens: vec![TokenUse { token: 3, in_prompt: true, output_count: 4 }],
            repetition_penalty: 1.5,
            presence_penalty: -0.5,
            frequency_penalty: 0.25,
            logit_bias: vec![(1, -100.0), (2, 3.5)],
            allowed_token_ids: Some(vec![1, 2, 3]),
            banned_token_ids: vec![9],
            temperature: 0.7,
            top_k: 40,
            top_p: 0.9,
            min_p: 0.05,
        };
        let free = OwnedDraw { allowed_token_ids: None, used_tokens: vec![], ..draw.clone() };
        let row = |kind, logprobs| OwnedRow { logits_row: 5, kind, logprobs };
        vec![
            row(OwnedKind::Sample(Box::new(draw)), Some(20)),
            row(OwnedKind::Sample(Box::new(free)), None),
            row(OwnedKind::Score { target: 8 }, Some(0)),
        ]
    }

    #[test]
    fn every_token_of_a_row_is_named() {
        let all: Vec<Vec<u32>> = some_rows().iter().map(|row| row.token_ids().collect()).collect();
        assert_eq!(all, [vec![3, 1, 2, 1, 2, 3, 9], vec![1, 2, 9], vec![8]]);
    }

    #[test]
    fn a_long_set_of_ids_takes_a_bit_each() {
        let sets =
            [vec![], vec![0], vec![4_000_000], (0..50_000).rev().collect(), (3..90_000).step_by(9).collect()];
        for ids in sets {
            let mut out = Encoder::new();
            encode_set(&mut out, &ids);
            let bytes = out.into_bytes();
            let highest = ids.iter().max().copied().unwrap_or(0) as usize;
            assert!(bytes.len() <= 9 + (4 * ids.len()).min(highest / 8 + 1), "{} bytes", bytes.len());
            let mut back = decode_set(&mut Decoder::new(&bytes)).unwrap();
            let mut ids = ids;
            [&mut back, &mut ids].into_iter().for_each(|ids| ids.sort_unstable());
            assert_eq!(back, ids);
        }
    }

    #[test]
    fn a_set_beyond_any_vocabulary_is_refused() {
        for (bytes, is_read) in [(MAX_SET_BYTES, true), (MAX_SET_BYTES + 1, false)] {
            let mut out = Encoder::new();
            out.bool(true).bytes(&vec![0; bytes]);
            assert_eq!(decode_set(&mut Decoder::new(&out.into_bytes())).is_ok(), is_read);
        }
    }

    #[test]
    fn rows_come_back_as_they_went() {
        let rows = some_rows();
        let mut out = Encoder::new();
        encode_rows(&rows.iter().map(OwnedRow::borrow).collect::<Vec<_>>(), &mut out);
        let bytes = out.into_bytes();
        assert_eq!(decode_rows(&mut Decoder::new(&bytes)).unwrap(), rows);
        for cut in 0..bytes.len() {
            assert!(decode_rows(&mut Decoder::new(&bytes[..cut])).is_err(), "{cut} of {} bytes", bytes.len());
        }
    }
}
