//! The byte-level alphabet of GPT-2: every byte has a printable character, and vocabularies are written in those.

/// The character that stands for `byte` in a byte-level vocabulary.
#[cfg(test)]
pub(super) fn byte_to_char(byte: u8) -> char {
    if is_plain(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&b| !is_plain(b)).count() as u32;
    char::from_u32(0x100 + rank).expect("below the surrogates")
}

/// The byte that `character` stands for, if it is of the alphabet.
pub(super) fn char_to_byte(character: char) -> Option<u8> {
    match character as u32 {
        code @ 0..0x100 => Some(code as u8).filter(|&b| is_plain(b)),
        code => (0..=255u8).filter(|&b| !is_plain(b)).nth((code - 0x100) as usize),
    }
}

/// The bytes of a token of a byte-level vocabulary. A token with a character outside the alphabet (an added token
/// such as a run of spaces) means its own UTF-8.
pub(super) fn token_bytes(token: &str) -> Vec<u8> {
    token.chars().map(char_to_byte).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

/// Bytes that stand for themselves: the printable ones of Latin-1.
fn is_plain(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_a_character_and_back() {
        for byte in 0..=255u8 {
            assert_eq!(char_to_byte(byte_to_char(byte)), Some(byte));
        }
        assert_eq!(byte_to_char(b' '), 'Ġ');
        assert_eq!(byte_to_char(b'\n'), 'Ċ');
    }

    #[test]
    fn characters_outside_the_alphabet_stand_for_their_own_utf8() {
        assert_eq!(char_to_byte(' '), None);
        assert_eq!(char_to_byte('\u{144}'), None);
        assert_eq!(token_bytes("Ġhi"), b" hi");
        assert_eq!(token_bytes("a b"), b"a b");
        assert_eq!(token_bytes("日"), "日".as_bytes());
    }
}
