//! Numbers for people.

/// `1234567` as `1,234,567`.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Bytes in the largest binary unit that keeps a digit before the point.
pub(super) fn bytes(number: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.into_iter().find(|&(_, shift)| number >> shift > 0) {
        Some((unit, shift)) => format!("{:.1} {unit}", number as f64 / (1u64 << shift) as f64),
        None => format!("{number} B"),
    }
}

/// Parameters in millions or billions.
pub(super) fn parameters(number: u64) -> String {
    match number {
        1_000_000_000.. => format!("{:.2} B parameters", number as f64 / 1e9),
        1_000_000.. => format!("{:.1} M parameters", number as f64 / 1e6),
        _ => format!("{} parameters", grouped(number)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(
            ["0", "999", "1,000", "1,234,567"],
            [0, 999, 1_000, 1_234_567].map(grouped).each_ref().map(|s| s.as_str())
        );
        assert_eq!([bytes(5), bytes(1536), bytes(4 << 30)], ["5 B", "1.5 KiB", "4.0 GiB"]);
        assert_eq!(
            [parameters(134_515_008), parameters(8_030_261_248)],
            ["134.5 M parameters", "8.03 B parameters"]
        );
    }
}
