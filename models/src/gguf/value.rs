//! Values of GGUF metadata, borrowed from the file.

/// The types a metadata value can have, with the file's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueType {
    /// 8-bit unsigned.
    U8 = 0,
    /// 8-bit signed.
    I8 = 1,
    /// 16-bit unsigned.
    U16 = 2,
    /// 16-bit signed.
    I16 = 3,
    /// 32-bit unsigned.
    U32 = 4,
    /// 32-bit signed.
    I32 = 5,
    /// 32-bit floating point.
    F32 = 6,
    /// One byte, 0 or 1.
    Bool = 7,
    /// Length (u64) and UTF-8.
    String = 8,
    /// Element type (u32), count (u64), elements.
    Array = 9,
    /// 64-bit unsigned.
    U64 = 10,
    /// 64-bit signed.
    I64 = 11,
    /// 64-bit floating point.
    F64 = 12,
}

impl ValueType {
    pub(super) fn from_number(number: u32) -> Option<Self> {
        use ValueType::*;
        let types = [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64];
        types.into_iter().find(|&value_type| value_type as u32 == number)
    }

    /// Bytes of the smallest value of this type: its size, or for strings and arrays that of an empty one.
    pub(super) fn min_bytes(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::String => 8,
            Self::Array => 12,
        }
    }
}

/// A metadata value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    /// Any unsigned integer type.
    Unsigned(u64),
    /// Any signed integer type.
    Signed(i64),
    /// Either floating-point type.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// Text.
    String(&'a str),
    /// A list of one type.
    Array(Array<'a>),
}

/// A list whose elements were checked when the file was read and are decoded when they are asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Array<'a> {
    pub(super) element: ValueType,
    pub(super) len: usize,
    /// The elements' bytes, exactly.
    pub(super) bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Type of the elements.
    pub fn element_type(&self) -> ValueType {
        self.element
    }

    /// The elements of a list of strings; `None` for another type.
    pub fn strings(&self) -> Option<impl Iterator<Item = &'a str> + use<'a>> {
        let mut rest = self.bytes;
        let next = move || {
            let (length, tail) = rest.split_first_chunk::<8>()?;
            let (text, tail) = tail.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
            rest = tail;
            std::str::from_utf8(text).ok()
        };
        (self.element == ValueType::String).then(|| std::iter::from_fn(next))
    }

    /// The elements of a list of 32-bit signed or unsigned integers (read as signed); `None` for another type.
    pub fn i32s(&self) -> Option<impl Iterator<Item = i32> + use<'a>> {
        let words = self.bytes.as_chunks::<4>().0.iter().map(|&word| i32::from_le_bytes(word));
        matches!(self.element, ValueType::I32 | ValueType::U32).then_some(words)
    }

    /// The elements of a list of 32-bit floating-point numbers; `None` for another type.
    pub fn f32s(&self) -> Option<impl Iterator<Item = f32> + use<'a>> {
        let words = self.bytes.as_chunks::<4>().0.iter().map(|&word| f32::from_le_bytes(word));
        (self.element == ValueType::F32).then_some(words)
    }
}
