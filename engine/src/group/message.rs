//! What the leader and its ranks say to each other, and how it looks on the wire.
//!
//! Every message travels with the group's epoch and its sender's incarnation (`tandem_wire::Message`), so these types
//! hold only what a message is about. Bytes from a socket are hostile until decoded: every read is checked, lists are
//! bounded by the bytes that are there, and what is left over is an error.

use std::time::Duration;

use tandem_wire::Incarnation;
use tandem_wire::codec::{DecodeError, Decoder, Encoder};

use super::rows::{decode_rows, encode_rows};
use crate::error::RowError;
use crate::executor::SampledToken;
use crate::sample_row::{OwnedRow, SampleRow};
use crate::step_plan::{BlockCopy, PlannedSequence, StepPlan};
use crate::stream::TokenLogprobs;

/// Two processes of one group speak the same version; a change of any message changes it.
pub(crate) const PROTOCOL_VERSION: u32 = 3;

/// From a rank to its leader.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum ToLeader {
    /// The first message of a connection.
    Hello(Hello),
    /// The rank's weights are in memory.
    Loaded(Loaded),
    /// The rank is connected to all others of this epoch and has its KV memory.
    Formed,
    /// It could not be, and why.
    NotFormed { reason: String },
    /// Nothing of any epoch up to the message's runs here any more.
    Idle,
    /// A step is computed; only rank 0, which draws, says so.
    Answer(Answer),
    /// A step could not be computed.
    StepFailed { step: u64, reason: String },
    /// The sender lives; where its computing thread is.
    Heartbeat { step: u64, phase: Phase },
    /// The rank's pod has been asked to stop.
    Leaving,
}

/// From the leader to a rank.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum ToRank {
    /// The rank is a member now. Where clients find the leader, for pods that pass requests on.
    Welcome { leader_http: String },
    /// It is not, and why; the connection ends.
    Refuse { reason: String },
    /// Connect to the others and take the memory for KV: the message's epoch begins.
    Form { num_blocks: u64, members: Vec<MemberAddress> },
    /// Compute a step.
    Step(Box<Step>),
    /// Overwrite the KV of these blocks with NaN.
    Poison { blocks: Vec<u32> },
    /// Give up everything of the message's epoch and older ones, and say `Idle`.
    Abort,
    /// The leader lives; how the group is.
    Heartbeat(GroupNews),
    /// A rank that is leaving may go.
    Release,
}

/// Who a rank is.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Hello {
    pub(crate) rank: u32,
    /// The highest epoch it was part of; 0 for none.
    pub(crate) last_epoch: u64,
    /// The port where it takes connections of its peers.
    pub(crate) port: u16,
    /// Everything that must be equal on both sides, in an order that is the same everywhere.
    pub(crate) terms: Vec<Term>,
}

/// One thing that all ranks of a group must agree on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Term {
    pub(crate) name: String,
    pub(crate) value: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Loaded {
    /// KV blocks that the rank has memory for.
    pub(crate) max_blocks: u64,
    /// Packed weights in memory.
    pub(crate) weight_bytes: u64,
    /// Bytes of the files that packing them has touched.
    pub(crate) read_bytes: u64,
}

/// Where a rank of an epoch listens, and which process it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MemberAddress {
    pub(crate) address: String,
    pub(crate) incarnation: Incarnation,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Step {
    pub(crate) plan: StepPlan,
    /// [`StepPlan::digest`] of the plan as the leader made it.
    pub(crate) digest: u64,
    pub(crate) rows: Vec<OwnedRow>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answer {
    pub(crate) step: u64,
    pub(crate) forward: Duration,
    pub(crate) rows: Vec<Result<SampledToken, RowError>>,
}

/// Where a rank's computing thread is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Reading weights.
    Loading,
    /// Waiting for the leader.
    Idle,
    /// Connecting to the other ranks.
    Forming,
    /// In a step.
    Computing,
}

/// How the group is, for probes and logs of the pods that follow.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct GroupNews {
    pub(crate) ready: bool,
    /// Why not, one line for each reason.
    pub(crate) reasons: Vec<String>,
    /// Whether each rank is a member.
    pub(crate) ranks_up: Vec<bool>,
}

impl ToLeader {
    /// Kind and payload.
    pub(crate) fn encode(&self) -> (u8, Vec<u8>) {
        let mut out = Encoder::new();
        let kind = match self {
            Self::Hello(hello) => {
                out.u32(hello.rank);
                out.u64(hello.last_epoch);
                out.u16(hello.port);
                out.list(&hello.terms, |out, term| out.str(&term.name).str(&term.value));
                1
            }
            Self::Loaded(loaded) => {
                out.u64(loaded.max_blocks);
                out.u64(loaded.weight_bytes);
                out.u64(loaded.read_bytes);
                2
            }
            Self::Formed => 3,
            Self::NotFormed { reason } => {
                out.str(reason);
                4
            }
            Self::Idle => 5,
            Self::Answer(answer) => {
                out.u64(answer.step);
                out.u64(answer.forward.as_nanos() as u64);
                out.list(&answer.rows, encode_answer);
                6
            }
            Self::StepFailed { step, reason } => {
                out.u64(*step);
                out.str(reason);
                7
            }
            Self::Heartbeat { step, phase } => {
                out.u64(*step);
                out.u8(*phase as u8);
                8
            }
            Self::Leaving => 9,
        };
        (kind, out.into_bytes())
    }

    pub(crate) fn decode(kind: u8, payload: &[u8]) -> Result<Self, DecodeError> {
        let mut decoder = Decoder::new(payload);
        let input = &mut decoder;
        let message = match kind {
            1 => Self::Hello(Hello {
                rank: input.u32()?,
                last_epoch: input.u64()?,
                port: input.u16()?,
                terms: input.list(8, |input| {
                    Ok(Term { name: input.str()?.to_owned(), value: input.str()?.to_owned() })
                })?,
            }),
            2 => Self::Loaded(Loaded {
                max_blocks: input.u64()?,
                weight_bytes: input.u64()?,
                read_bytes: input.u64()?,
            }),
            3 => Self::Formed,
            4 => Self::NotFormed { reason: input.str()?.to_owned() },
            5 => Self::Idle,
            6 => Self::Answer(Answer {
                step: input.u64()?,
                forward: Duration::from_nanos(input.u64()?),
                rows: input.list(1, decode_answer)?,
            }),
            7 => Self::StepFailed { step: input.u64()?, reason: input.str()?.to_owned() },
            8 => Self::Heartbeat { step: input.u64()?, phase: Phase::decode(input.u8()?)? },
            9 => Self::Leaving,
            other => return Err(DecodeError::Unknown { what: "message kind", value: u64::from(other) }),
        };
        decoder.finish()?;
        Ok(message)
    }
}

impl ToRank {
    /// Kind and payload.
    pub(crate) fn encode(&self) -> (u8, Vec<u8>) {
        let mut out = Encoder::new();
        let kind = match self {
            Self::Welcome { leader_http } => {
                out.str(leader_http);
                1
            }
            Self::Refuse { reason } => {
                out.str(reason);
                2
            }
            Self::Form { num_blocks, members } => {
                out.u64(*num_blocks);
                out.list(members, |out, member| out.str(&member.address).u128(member.incarnation.0));
                3
            }
            Self::Step(step) => {
                let rows: Vec<SampleRow<'_>> = step.rows.iter().map(OwnedRow::borrow).collect();
                put_step(&step.plan, step.digest, &rows, &mut out);
                STEP_KIND
            }
            Self::Poison { blocks } => {
                out.u32s(blocks);
                5
            }
            Self::Abort => 6,
            Self::Heartbeat(news) => {
                out.bool(news.ready);
                out.list(&news.reasons, |out, reason| out.str(reason));
                out.list(&news.ranks_up, |out, up| out.bool(*up));
                7
            }
            Self::Release => 8,
        };
        (kind, out.into_bytes())
    }

    pub(crate) fn decode(kind: u8, payload: &[u8]) -> Result<Self, DecodeError> {
        let mut decoder = Decoder::new(payload);
        let input = &mut decoder;
        let message = match kind {
            1 => Self::Welcome { leader_http: input.str()?.to_owned() },
            2 => Self::Refuse { reason: input.str()?.to_owned() },
            3 => Self::Form {
                num_blocks: input.u64()?,
                members: input.list(20, |input| {
                    let address = input.str()?.to_owned();
                    Ok(MemberAddress { address, incarnation: Incarnation(input.u128()?) })
                })?,
            },
            STEP_KIND => Self::Step(Box::new(Step {
                plan: decode_plan(input)?,
                digest: input.u64()?,
                rows: decode_rows(input)?,
            })),
            5 => Self::Poison { blocks: input.u32s()? },
            6 => Self::Abort,
            7 => Self::Heartbeat(GroupNews {
                ready: input.bool()?,
                reasons: input.list(4, |input| Ok(input.str()?.to_owned()))?,
                ranks_up: input.list(1, Decoder::bool)?,
            }),
            8 => Self::Release,
            other => return Err(DecodeError::Unknown { what: "message kind", value: u64::from(other) }),
        };
        decoder.finish()?;
        Ok(message)
    }
}

const STEP_KIND: u8 = 4;

/// Kind of [`ToRank::Step`], and its payloads with rows and, unless all ranks get these, without; without the copies that its owned form
/// would take.
pub(crate) fn encode_step(
    plan: &StepPlan,
    rows: &[SampleRow<'_>],
    to_all: bool,
) -> (u8, Vec<u8>, Option<Vec<u8>>) {
    let digest = plan.digest();
    let payload = |rows: &[SampleRow<'_>]| {
        let mut out = Encoder::new();
        put_step(plan, digest, rows, &mut out);
        out.into_bytes()
    };
    (STEP_KIND, payload(rows), (!to_all).then(|| payload(&[])))
}

fn put_step(plan: &StepPlan, digest: u64, rows: &[SampleRow<'_>], out: &mut Encoder) {
    encode_plan(plan, out);
    out.u64(digest);
    encode_rows(rows, out);
}

impl Phase {
    fn decode(value: u8) -> Result<Self, DecodeError> {
        [Self::Loading, Self::Idle, Self::Forming, Self::Computing]
            .into_iter()
            .find(|phase| *phase as u8 == value)
            .ok_or(DecodeError::Unknown { what: "phase", value: u64::from(value) })
    }
}

fn encode_plan(plan: &StepPlan, out: &mut Encoder) {
    out.u64(plan.step);
    out.u32(plan.block_size);
    out.list(&plan.sequences, |out, sequence| {
        out.u64(sequence.request).u32(sequence.choice).u32(sequence.context_len);
        out.u32s(&sequence.token_ids).option(sequence.pending_row, Encoder::u32);
        out.u32s(&sequence.block_table).u32s(&sequence.logits_rows)
    });
    out.list(&plan.block_copies, |out, copy| out.u32(copy.source).u32(copy.destination));
}

fn decode_plan(input: &mut Decoder<'_>) -> Result<StepPlan, DecodeError> {
    Ok(StepPlan {
        step: input.u64()?,
        block_size: input.u32()?,
        sequences: input.list(29, |input| {
            Ok(PlannedSequence {
                request: input.u64()?,
                choice: input.u32()?,
                context_len: input.u32()?,
                token_ids: input.u32s()?,
                pending_row: input.option(Decoder::u32)?,
                block_table: input.u32s()?,
                logits_rows: input.u32s()?,
            })
        })?,
        block_copies: input
            .list(8, |input| Ok(BlockCopy { source: input.u32()?, destination: input.u32()? }))?,
    })
}

fn encode_answer<'e>(out: &'e mut Encoder, row: &Result<SampledToken, RowError>) -> &'e mut Encoder {
    let SampledToken { token, logprobs } = match row {
        Ok(sampled) => sampled,
        Err(RowError::NotFinite) => return out.u8(1),
        Err(RowError::AllMasked) => return out.u8(2),
        Err(RowError::OutsideVocabulary) => return out.u8(3),
    };
    out.u8(0).u32(*token).option(logprobs.as_ref(), |out, logprobs| {
        out.u32(logprobs.token).f32(logprobs.logprob).u32(logprobs.rank);
        out.list(&logprobs.top, |out, &(token, logprob)| out.u32(token).f32(logprob))
    })
}

fn decode_answer(input: &mut Decoder<'_>) -> Result<Result<SampledToken, RowError>, DecodeError> {
    Ok(match input.u8()? {
        0 => {
            let token = input.u32()?;
            let logprobs = input.option(|input| {
                Ok(TokenLogprobs {
                    token: input.u32()?,
                    logprob: input.f32()?,
                    rank: input.u32()?,
                    top: input.list(8, |input| Ok((input.u32()?, input.f32()?)))?,
                })
            })?;
            Ok(SampledToken { token, logprobs })
        }
        1 => Err(RowError::NotFinite),
        2 => Err(RowError::AllMasked),
        3 => Err(RowError::OutsideVocabulary),
        other => return Err(DecodeError::Unknown { what: "answer kind", value: u64::from(other) }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::rows::tests::some_rows;

    fn plan() -> StepPlan {
        let sequence = |choice| PlannedSequence {
            request: 3,
            choice,
            context_len: 16,
            token_ids: vec![5, 6],
            pending_row: (choice == 1).then_some(3),
            block_table: vec![2, 9],
            logits_rows: vec![1],
        };
        StepPlan {
            step: 7,
            block_size: 16,
            sequences: vec![sequence(0), sequence(1)],
            block_copies: vec![BlockCopy { source: 1, destination: 9 }],
        }
    }

    fn to_leader() -> Vec<ToLeader> {
        let logprobs = TokenLogprobs { token: 4, logprob: -0.5, rank: 1, top: vec![(4, -0.5), (9, -2.0)] };
        let rows = vec![
            Ok(SampledToken { token: 4, logprobs: Some(logprobs) }),
            Ok(SampledToken { token: 5, logprobs: None }),
            Err(RowError::NotFinite),
            Err(RowError::AllMasked),
            Err(RowError::OutsideVocabulary),
        ];
        let term = Term { name: "instruction set".into(), value: "avx2".into() };
        vec![
            ToLeader::Hello(Hello { rank: 3, last_epoch: 9, port: 7401, terms: vec![term.clone(), term] }),
            ToLeader::Loaded(Loaded { max_blocks: 1, weight_bytes: 2, read_bytes: 3 }),
            ToLeader::Formed,
            ToLeader::NotFormed { reason: "rank 2 refused".into() },
            ToLeader::Idle,
            ToLeader::Answer(Answer { step: 8, forward: Duration::from_micros(17), rows }),
            ToLeader::StepFailed { step: 8, reason: "digest".into() },
            ToLeader::Heartbeat { step: 4, phase: Phase::Computing },
            ToLeader::Leaving,
        ]
    }

    fn to_rank() -> Vec<ToRank> {
        let member =
            MemberAddress { address: "10.0.0.1:7401".into(), incarnation: Incarnation(u128::MAX - 5) };
        let news = GroupNews { ready: false, reasons: vec!["rank 1".into()], ranks_up: vec![true, false] };
        vec![
            ToRank::Welcome { leader_http: "10.0.0.1:8000".into() },
            ToRank::Refuse { reason: "no".into() },
            ToRank::Form { num_blocks: 77, members: vec![member.clone(), member] },
            ToRank::Step(Box::new(Step { plan: plan(), digest: plan().digest(), rows: some_rows() })),
            ToRank::Poison { blocks: vec![1, 2, 3] },
            ToRank::Abort,
            ToRank::Heartbeat(news),
            ToRank::Release,
        ]
    }

    #[test]
    fn every_message_comes_back_as_it_went() {
        for message in to_leader() {
            let (kind, payload) = message.encode();
            assert_eq!(ToLeader::decode(kind, &payload), Ok(message));
        }
        for message in to_rank() {
            let (kind, payload) = message.encode();
            assert_eq!(ToRank::decode(kind, &payload), Ok(message));
        }
        let rows = some_rows();
        let borrowed: Vec<SampleRow<'_>> = rows.iter().map(OwnedRow::borrow).collect();
        let step = ToRank::Step(Box::new(Step { plan: plan(), digest: plan().digest(), rows: some_rows() }));
        let (kind, first, others) = encode_step(&plan(), &borrowed, false);
        assert_eq!((kind, first.clone()), step.encode());
        let (_, same, _) = encode_step(&plan(), &[], true);
        assert_eq!(others, Some(same));
        assert_eq!(encode_step(&plan(), &borrowed, true), (kind, first, None));
    }

    /// Cut short, prolonged or changed, a message is an error or another message, never a panic.
    #[test]
    fn damaged_messages_are_refused_or_read_as_others() {
        let (to_leader, to_rank) = (to_leader(), to_rank());
        let all = to_leader.iter().map(ToLeader::encode).chain(to_rank.iter().map(ToRank::encode));
        for (kind, payload) in all {
            for cut in 0..payload.len() {
                assert!(ToLeader::decode(kind, &payload[..cut]).is_err() || kind != 1);
                let _ = ToRank::decode(kind, &payload[..cut]);
            }
            let longer = [&payload[..], &[0]].concat();
            assert!(ToLeader::decode(kind, &longer).is_err());
            for at in 0..payload.len() {
                for value in [0, 1, 0x7f, 0xff] {
                    let mut changed = payload.clone();
                    changed[at] = value;
                    let _ = (ToLeader::decode(kind, &changed), ToRank::decode(kind, &changed));
                }
            }
        }
        assert!(ToLeader::decode(0, &[]).is_err() && ToRank::decode(99, &[]).is_err());
    }
}
