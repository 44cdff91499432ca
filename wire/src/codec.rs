//! Payloads: plain values one after the other, little-endian, with a length before everything that has one.
//!
//! Both sides have to agree on the order; nothing in the bytes says what a value is. A [`Decoder`] reads
//! hostile bytes: it takes memory only for what is there, and each error says where.

/// Writes values.
#[derive(Clone, Debug, Default)]
pub struct Encoder {
    bytes: Vec<u8>,
}

macro_rules! encode_integers {
    ($($name:ident)*) => {$(
        #[doc = concat!("A `", stringify!($name), "`, little-endian.")]
        pub fn $name(&mut self, value: $name) -> &mut Self {
            self.raw(&value.to_le_bytes())
        }
    )*};
}

impl Encoder {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    encode_integers!(u8 u16 u32 u64 u128);

    /// The bits of an `f32`: NaNs and the sign of zero survive.
    pub fn f32(&mut self, value: f32) -> &mut Self {
        self.u32(value.to_bits())
    }

    /// One byte, 0 or 1.
    pub fn bool(&mut self, value: bool) -> &mut Self {
        self.u8(u8::from(value))
    }

    /// A `u32` length, then the bytes.
    ///
    /// # Panics
    /// If there are more than `u32::MAX`, as in the other methods with a length: no message holds that many.
    pub fn bytes(&mut self, value: &[u8]) -> &mut Self {
        self.len(value.len()).raw(value)
    }

    /// As [`bytes`](Self::bytes), of the UTF-8.
    pub fn str(&mut self, value: &str) -> &mut Self {
        self.bytes(value.as_bytes())
    }

    /// A `u32` length, then the values.
    pub fn u32s(&mut self, values: &[u32]) -> &mut Self {
        self.list(values, |encoder, value| encoder.u32(*value))
    }

    /// A `u32` length, then each item as `encode` writes it.
    pub fn list<T>(
        &mut self,
        items: &[T],
        mut encode: impl for<'e> FnMut(&'e mut Self, &T) -> &'e mut Self,
    ) -> &mut Self {
        self.len(items.len());
        for item in items {
            encode(self, item);
        }
        self
    }

    /// A [`bool`](Self::bool) that says whether there is a value, then the value.
    pub fn option<T>(
        &mut self,
        value: Option<T>,
        encode: impl for<'e> FnOnce(&'e mut Self, T) -> &'e mut Self,
    ) -> &mut Self {
        self.bool(value.is_some());
        match value {
            Some(value) => encode(self, value),
            None => self,
        }
    }

    /// What has been written.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What has been written, for keeps.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Forgets what has been written and keeps its memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    fn len(&mut self, len: usize) -> &mut Self {
        self.u32(u32::try_from(len).expect("a list in a message has fewer than 2^32 items"))
    }

    fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }
}

/// Reads what an [`Encoder`] has written. After an error, where the next value begins is unknown.
#[derive(Clone, Debug)]
pub struct Decoder<'a> {
    left: &'a [u8],
    len: usize,
}

/// Why bytes are not the values that were asked for. Offsets count bytes from the start of the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The bytes end inside a value.
    #[error("{needed} bytes needed at offset {offset}, {left} left")]
    Truncated {
        /// Where the value begins, behind its length if it has one.
        offset: usize,
        /// Bytes it needs, at least.
        needed: u64,
        /// Bytes there are.
        left: usize,
    },
    /// A byte that should be 0 or 1 is neither.
    #[error("{value} at offset {offset} is neither 0 nor 1")]
    NotBool {
        /// Where the byte is.
        offset: usize,
        /// What it is.
        value: u8,
    },
    /// Text that is not UTF-8.
    #[error("the text at offset {offset} is not UTF-8")]
    NotUtf8 {
        /// Where the text begins, behind its length.
        offset: usize,
    },
    /// A well-formed value that its user has no meaning for; for decoders built on this one.
    #[error("{value} is no {what}")]
    Unknown {
        /// What the value should have been.
        what: &'static str,
        /// What it is.
        value: u64,
    },
    /// Bytes are left when all values have been read.
    #[error("{left} bytes too many")]
    LeftOver {
        /// How many.
        left: usize,
    },
}

macro_rules! decode_integers {
    ($($name:ident)*) => {$(
        #[doc = concat!("A `", stringify!($name), "`.\n\n# Errors\n[`DecodeError::Truncated`].")]
        pub fn $name(&mut self) -> Result<$name, DecodeError> {
            self.array().map($name::from_le_bytes)
        }
    )*};
}

impl<'a> Decoder<'a> {
    /// Reads `bytes` from the front.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { left: bytes, len: bytes.len() }
    }

    decode_integers!(u8 u16 u32 u64 u128);

    /// An `f32`, bit for bit.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn f32(&mut self) -> Result<f32, DecodeError> {
        self.u32().map(f32::from_bits)
    }

    /// A `bool`.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`], or [`DecodeError::NotBool`] for a byte that is neither 0 nor 1.
    pub fn bool(&mut self) -> Result<bool, DecodeError> {
        let offset = self.offset();
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(DecodeError::NotBool { offset, value }),
        }
    }

    /// Bytes with a length before them, where they lie.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn bytes(&mut self) -> Result<&'a [u8], DecodeError> {
        let len = self.u32()?;
        self.raw(u64::from(len))
    }

    /// Text with a length before it, where it lies.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`] or [`DecodeError::NotUtf8`].
    pub fn str(&mut self) -> Result<&'a str, DecodeError> {
        let bytes = self.bytes()?;
        let offset = self.offset() - bytes.len();
        str::from_utf8(bytes).map_err(|_| DecodeError::NotUtf8 { offset })
    }

    /// A list of `u32`.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn u32s(&mut self) -> Result<Vec<u32>, DecodeError> {
        self.list(size_of::<u32>(), Self::u32)
    }

    /// A list of what `decode` reads, of which each item takes at least `min_item_bytes` (counted as 1 if 0).
    ///
    /// # Errors
    /// [`DecodeError::Truncated`] when that many items cannot be there, before memory is taken, and what
    /// `decode` says.
    pub fn list<T>(
        &mut self,
        min_item_bytes: usize,
        mut decode: impl FnMut(&mut Self) -> Result<T, DecodeError>,
    ) -> Result<Vec<T>, DecodeError> {
        let num_items = self.u32()?;
        self.check(u64::from(num_items).saturating_mul(min_item_bytes.max(1) as u64))?;
        let mut items = Vec::with_capacity(first_capacity::<T>(num_items, self.left.len()));
        for _ in 0..num_items {
            items.push(decode(self)?);
        }
        Ok(items)
    }

    /// What `decode` reads, if there is a value.
    ///
    /// # Errors
    /// Those of [`bool`](Self::bool), and what `decode` says.
    pub fn option<T>(
        &mut self,
        decode: impl FnOnce(&mut Self) -> Result<T, DecodeError>,
    ) -> Result<Option<T>, DecodeError> {
        if self.bool()? { decode(self).map(Some) } else { Ok(None) }
    }

    /// Ends reading.
    ///
    /// # Errors
    /// [`DecodeError::LeftOver`] when there are bytes that nobody read.
    pub fn finish(self) -> Result<(), DecodeError> {
        if self.left.is_empty() { Ok(()) } else { Err(DecodeError::LeftOver { left: self.left.len() }) }
    }

    fn offset(&self) -> usize {
        self.len - self.left.len()
    }

    fn check(&self, needed: u64) -> Result<(), DecodeError> {
        let left = self.left.len();
        if needed <= left as u64 {
            Ok(())
        } else {
            Err(DecodeError::Truncated { offset: self.offset(), needed, left })
        }
    }

    fn raw(&mut self, len: u64) -> Result<&'a [u8], DecodeError> {
        self.check(len)?;
        // It fits the bytes that are left, so it fits a `usize`.
        let (bytes, left) = self.left.split_at(len as usize);
        self.left = left;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let bytes = self.raw(N as u64)?;
        Ok(bytes.try_into().expect("as many bytes as were asked for"))
    }
}

/// Items to take memory for before one has been read. They may be larger in memory than in the payload: what
/// goes beyond the bytes that are left grows only as items turn out to be there.
fn first_capacity<T>(num_items: u32, bytes_left: usize) -> usize {
    (num_items as usize).min(bytes_left / size_of::<T>().max(1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_kind_of_value_comes_back() {
        let mut encoder = Encoder::new();
        encoder
            .u8(1)
            .u16(0x0203)
            .u32(0x0405_0607)
            .u64(u64::MAX - 1)
            .u128(u128::MAX - 2)
            .bool(true)
            .bool(false);
        encoder.f32(-0.0).f32(f32::from_bits(0x7fc0_1234)).bytes(b"\x00\xff").bytes(b"").str("Grüße");
        encoder.u32s(&[3, 2, 1]).u32s(&[]).option(Some(9), Encoder::u32).option(None, Encoder::u64);
        encoder.list(&["a", "bc"], |encoder, name| encoder.str(name).u8(7));
        let bytes = encoder.clone().into_bytes();
        assert_eq!(bytes, encoder.as_bytes());

        let mut decoder = Decoder::new(&bytes);
        assert_eq!(decoder.u8(), Ok(1));
        assert_eq!(decoder.u16(), Ok(0x0203));
        assert_eq!(decoder.u32(), Ok(0x0405_0607));
        assert_eq!(decoder.u64(), Ok(u64::MAX - 1));
        assert_eq!(decoder.u128(), Ok(u128::MAX - 2));
        assert_eq!((decoder.bool(), decoder.bool()), (Ok(true), Ok(false)));
        assert_eq!(decoder.f32().unwrap().to_bits(), (-0.0f32).to_bits());
        assert_eq!(decoder.f32().unwrap().to_bits(), 0x7fc0_1234);
        assert_eq!(decoder.bytes(), Ok(&b"\x00\xff"[..]));
        assert_eq!(decoder.bytes(), Ok(&b""[..]));
        assert_eq!(decoder.str(), Ok("Grüße"));
        assert_eq!(decoder.u32s(), Ok(vec![3, 2, 1]));
        assert_eq!(decoder.u32s(), Ok(vec![]));
        assert_eq!(decoder.option(Decoder::u32), Ok(Some(9)));
        assert_eq!(decoder.option(Decoder::u64), Ok(None));
        let named = |decoder: &mut Decoder<'_>| Ok((decoder.str()?.to_owned(), decoder.u8()?));
        assert_eq!(decoder.list(5, named), Ok(vec![("a".to_owned(), 7), ("bc".to_owned(), 7)]));
        assert_eq!(decoder.finish(), Ok(()));

        encoder.clear();
        assert_eq!(encoder.u16(0x0102).as_bytes(), [2, 1]);
    }

    #[test]
    fn every_cut_is_noticed() {
        let mut encoder = Encoder::new();
        encoder.u128(1).str("text").u32s(&[1, 2]).option(Some(1.0), Encoder::f32);
        let read = |bytes: &[u8]| -> Result<(), DecodeError> {
            let mut decoder = Decoder::new(bytes);
            decoder.u128()?;
            decoder.str()?;
            decoder.u32s()?;
            decoder.option(Decoder::f32)?;
            decoder.finish()
        };
        let mut bytes = encoder.into_bytes();
        assert_eq!(read(&bytes), Ok(()));
        for len in 0..bytes.len() {
            let error = read(&bytes[..len]).unwrap_err();
            assert!(matches!(error, DecodeError::Truncated { .. }), "{len}: {error}");
        }
        bytes.push(0);
        assert_eq!(read(&bytes), Err(DecodeError::LeftOver { left: 1 }));
    }

    #[test]
    fn hostile_values_are_refused_where_they_stand() {
        let huge = [&[1][..], &u32::MAX.to_le_bytes(), &[0; 64]].concat();
        let after_one = || {
            let mut decoder = Decoder::new(&huge);
            assert_eq!(decoder.bool(), Ok(true));
            decoder
        };
        let truncated = |needed: u64| Err::<(), _>(DecodeError::Truncated { offset: 5, needed, left: 64 });
        let most = u64::from(u32::MAX);
        assert_eq!(after_one().bytes().map(|_| ()), truncated(most));
        assert_eq!(after_one().str().map(|_| ()), truncated(most));
        assert_eq!(after_one().u32s().map(|_| ()), truncated(4 * most));
        assert_eq!(after_one().list(0, |_| Ok(())).map(|_| ()), truncated(most));
        assert_eq!(after_one().list(usize::MAX, Decoder::u8).map(|_| ()), truncated(u64::MAX));

        assert_eq!(Decoder::new(&[2]).bool(), Err(DecodeError::NotBool { offset: 0, value: 2 }));
        assert_eq!(
            Decoder::new(&[255, 0]).option(Decoder::u8),
            Err(DecodeError::NotBool { offset: 0, value: 255 })
        );
        assert_eq!(Decoder::new(&[2, 0, 0, 0, b'a', 0xff]).str(), Err(DecodeError::NotUtf8 { offset: 4 }));
    }

    #[test]
    fn a_list_takes_no_more_memory_than_the_payload_has_bytes() {
        assert_eq!(first_capacity::<u32>(3, 12), 3);
        assert_eq!(first_capacity::<[u8; 16]>(1000, 1000), 62);
        assert_eq!(first_capacity::<()>(u32::MAX, 5), 5);
        // A list whose items are larger in memory than in the payload is whole all the same.
        let bytes = [&1000u32.to_le_bytes()[..], &[7; 1000]].concat();
        let items = Decoder::new(&bytes).list(1, |decoder| decoder.u8().map(|value| [value; 16]));
        assert_eq!(items, Ok(vec![[7; 16]; 1000]));
    }

    proptest! {
        #[test]
        fn values_come_back(
            wide in any::<u128>(), text in ".{0,40}", blob in prop::collection::vec(any::<u8>(), 0..200),
            list in prop::collection::vec(any::<u32>(), 0..50), maybe in any::<Option<u64>>(),
            bits in any::<u32>(),
        ) {
            let mut encoder = Encoder::new();
            encoder.u128(wide).str(&text).bytes(&blob).u32s(&list);
            encoder.option(maybe, Encoder::u64).f32(f32::from_bits(bits));
            let bytes = encoder.into_bytes();
            let mut decoder = Decoder::new(&bytes);
            prop_assert_eq!(decoder.u128(), Ok(wide));
            prop_assert_eq!(decoder.str(), Ok(text.as_str()));
            prop_assert_eq!(decoder.bytes(), Ok(&blob[..]));
            prop_assert_eq!(decoder.u32s(), Ok(list));
            prop_assert_eq!(decoder.option(Decoder::u64), Ok(maybe));
            prop_assert_eq!(decoder.f32().map(f32::to_bits), Ok(bits));
            prop_assert_eq!(decoder.finish(), Ok(()));
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            calls in prop::collection::vec(0u8..12, 0..40),
        ) {
            let mut decoder = Decoder::new(&bytes);
            let mut taken = 0;
            for call in calls {
                let before = decoder.left.len();
                match call {
                    0 => drop(decoder.u8()),
                    1 => drop(decoder.u16()),
                    2 => drop(decoder.u32()),
                    3 => drop(decoder.u64()),
                    4 => drop(decoder.u128()),
                    5 => drop(decoder.f32()),
                    6 => drop(decoder.bool()),
                    7 => drop(decoder.str()),
                    8 => drop(decoder.bytes()),
                    9 => drop(decoder.option(Decoder::u16)),
                    10 => {
                        if let Ok(list) = decoder.u32s() {
                            prop_assert!(4 * list.capacity() <= bytes.len());
                        }
                    }
                    _ => drop(decoder.list(1, |decoder| decoder.bytes().map(<[u8]>::to_vec))),
                }
                taken += before - decoder.left.len();
            }
            prop_assert_eq!(taken + decoder.left.len(), bytes.len());
        }
    }
}
