//! Charts as one self-contained SVG, readable on light and dark: axes with round ticks, lines, markers and a legend.
//!
//! A chart's ranges follow from its points, so that every point lies inside the axes. No script, no font, no reference
//! to anything outside the file.

use std::fmt::Write;

/// Width of the page and of one chart, height of a chart with its title and legend, in pixels.
const WIDTH: f64 = 920.0;
const HEIGHT: f64 = 400.0;
const HEADER: f64 = 64.0;
/// Space around the axes for titles, tick labels and legend.
const LEFT: f64 = 76.0;
const RIGHT: f64 = 28.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 92.0;
/// Width of a letter of the labels' size, to keep labels apart.
const LETTER: f64 = 6.4;
/// Height of a line of labels.
const LINE: f64 = 14.0;

/// Colours of the series on light and on dark; told apart also by the shape of their markers.
const COLOURS: [(&str, &str); 5] = [
    ("#1d63c4", "#74b0ff"),
    ("#c2500a", "#ffab66"),
    ("#1b7f4b", "#6fd39d"),
    ("#8a2fa8", "#d79bf0"),
    ("#5c6470", "#a8b0bc"),
];

/// One chart.
#[derive(Debug)]
pub(super) struct Chart {
    pub(super) title: String,
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) series: Vec<Series>,
}

/// An axis.
#[derive(Debug)]
pub(super) struct Axis {
    pub(super) label: String,
    pub(super) scale: Scale,
    /// Values with a tick; empty: round ones.
    pub(super) ticks: Vec<f64>,
}

/// How values become places.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Scale {
    /// From 0 on.
    Linear,
    /// Values must be above 0.
    Log,
}

/// Points of one kind.
#[derive(Debug)]
pub(super) struct Series {
    pub(super) name: String,
    pub(super) colour: usize,
    pub(super) line: Line,
    pub(super) markers: bool,
    pub(super) points: Vec<Point>,
}

/// How points are joined.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Line {
    None,
    Solid,
    Dashed,
}

/// A value with what is written beside it; empty for nothing.
#[derive(Debug, Clone, Default)]
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) label: String,
}

/// Charts below each other under a title and a line of details. Points that their axis cannot show (not finite, or not above 0 on a
/// logarithmic one) are left out.
pub(super) fn page(title: &str, details: &str, charts: &[Chart]) -> String {
    let height = HEADER + HEIGHT * charts.len() as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" role=\"img\" font-family=\"system-ui, sans-serif\" font-size=\"12\">\n{}",
        style()
    );
    let _ = writeln!(svg, "<rect class=\"paper\" width=\"{WIDTH}\" height=\"{height}\"/>");
    let _ = writeln!(svg, "<text class=\"ink\" x=\"24\" y=\"30\" font-size=\"16\">{}</text>", escaped(title));
    let _ = writeln!(svg, "<text class=\"ink\" x=\"24\" y=\"50\">{}</text>", escaped(details));
    for (index, chart) in charts.iter().enumerate() {
        let _ = writeln!(svg, "<g transform=\"translate(0 {})\">", HEADER + HEIGHT * index as f64);
        draw(&mut svg, chart);
        svg.push_str("</g>\n");
    }
    svg.push_str("</svg>\n");
    svg
}

fn style() -> String {
    let rules = |ink: &str, faint: &str, paper: &str, colours: Vec<&str>| {
        let mut rules = format!(
            ".paper{{fill:{paper}}}.ink{{fill:{ink}}}.axis{{stroke:{ink};fill:none}}.grid{{stroke:{faint};fill:none}}"
        );
        for (index, colour) in colours.iter().enumerate() {
            let _ = write!(
                rules,
                ".l{index}{{stroke:{colour};fill:none;stroke-width:2}}.m{index}{{fill:{colour}}}"
            );
        }
        rules
    };
    let light = rules("#22262c", "#dfe3e8", "#ffffff", COLOURS.map(|(light, _)| light).to_vec());
    let dark = rules("#e6e9ed", "#363c45", "#15181d", COLOURS.map(|(_, dark)| dark).to_vec());
    format!("<style>{light}@media (prefers-color-scheme:dark){{{dark}}}</style>\n")
}

/// The places of values along one axis.
#[derive(Debug)]
struct Range {
    scale: Scale,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Range {
    /// The smallest range with round ends that holds the values.
    fn over(values: impl Iterator<Item = f64>, axis: &Axis, (from, to): (f64, f64)) -> Self {
        let all = values.chain(axis.ticks.iter().copied()).filter(|&value| can_show(axis.scale, value));
        let (least, most) =
            all.fold((f64::INFINITY, 0.0f64), |(least, most), value| (least.min(value), most.max(value)));
        let (low, high) = match axis.scale {
            Scale::Linear => {
                let step = round_step(most);
                (0.0, if most > 0.0 { (most / step).ceil() * step } else { 1.0 })
            }
            Scale::Log if most == 0.0 => (1.0, 10.0),
            // A little air around the outermost values where their ticks are given, else round ends.
            Scale::Log if !axis.ticks.is_empty() => (least / 1.25, most * 1.25),
            Scale::Log => {
                let (low, high) = (round_down(least), round_up(most));
                if low < high { (low, high) } else { (low / 2.0, high * 2.0) }
            }
        };
        Self { scale: axis.scale, low, high, from, to }
    }

    fn place(&self, value: f64) -> f64 {
        let share = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        };
        self.from + share * (self.to - self.from)
    }

    fn ticks(&self, axis: &Axis) -> Vec<f64> {
        if !axis.ticks.is_empty() {
            return axis.ticks.clone();
        }
        if self.scale == Scale::Linear {
            let step = round_step(self.high);
            return (0..=(self.high / step).round() as usize).map(|i| i as f64 * step).collect();
        }
        let decades = (self.high / self.low).log10();
        let digits: &[f64] = if decades <= 3.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let first = self.low.log10().floor() as i32;
        let last = self.high.log10().ceil() as i32;
        let all = (first..=last).flat_map(|power| digits.iter().map(move |digit| digit * 10f64.powi(power)));
        all.filter(|&tick| tick >= self.low * 0.999 && tick <= self.high * 1.001).collect()
    }
}

fn can_show(scale: Scale, value: f64) -> bool {
    value.is_finite() && if scale == Scale::Log { value > 0.0 } else { value >= 0.0 }
}

/// A step of 1, 2 or 5 times a power of ten that gives about five ticks up to `most`.
fn round_step(most: f64) -> f64 {
    if most > 0.0 { round_up(most / 6.0) } else { 1.0 }
}

/// The next 1, 2 or 5 times a power of ten from `value` on.
pub(super) fn round_up(value: f64) -> f64 {
    let power = 10f64.powf(value.log10().floor());
    let digits = [1.0, 2.0, 5.0, 10.0];
    digits
        .map(|digit| digit * power)
        .into_iter()
        .find(|&round| round >= value * 0.999_999)
        .unwrap_or(10.0 * power)
}

/// The last 1, 2 or 5 times a power of ten up to `value`.
pub(super) fn round_down(value: f64) -> f64 {
    let power = 10f64.powf(value.log10().floor());
    let digits = [5.0, 2.0, 1.0];
    digits.map(|digit| digit * power).into_iter().find(|&round| round <= value * 1.000_001).unwrap_or(power)
}

fn draw(svg: &mut String, chart: &Chart) {
    let (x_axis, y_axis) = (&chart.x, &chart.y);
    let shown = |point: &&Point| can_show(x_axis.scale, point.x) && can_show(y_axis.scale, point.y);
    let points = || chart.series.iter().flat_map(|series| &series.points).filter(shown);
    let x = Range::over(points().map(|p| p.x), x_axis, (LEFT, WIDTH - RIGHT));
    let y = Range::over(points().map(|p| p.y), y_axis, (HEIGHT - BOTTOM, TOP));

    let _ = writeln!(
        svg,
        "<text class=\"ink\" x=\"{LEFT}\" y=\"22\" font-size=\"14\">{}</text>",
        escaped(&chart.title)
    );
    draw_axes(svg, chart, &x, &y);
    for series in &chart.series {
        let places: Vec<(f64, f64)> =
            series.points.iter().filter(shown).map(|p| (x.place(p.x), y.place(p.y))).collect();
        draw_series(svg, series, &places);
    }
    draw_labels(svg, chart, &x, &y);
    draw_legend(svg, &chart.series);
}

fn draw_axes(svg: &mut String, chart: &Chart, x: &Range, y: &Range) {
    let (left, right, top, bottom) = (LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM);
    for tick in x.ticks(&chart.x) {
        let (at, below) = (x.place(tick), bottom + 17.0);
        let _ = writeln!(svg, "<path class=\"grid\" d=\"M{at:.1} {top}V{bottom}\"/>");
        let text = short(tick);
        let _ = writeln!(
            svg,
            "<text class=\"ink\" x=\"{at:.1}\" y=\"{below}\" text-anchor=\"middle\">{text}</text>"
        );
    }
    for tick in y.ticks(&chart.y) {
        let (at, beside) = (y.place(tick), left - 8.0);
        let _ = writeln!(svg, "<path class=\"grid\" d=\"M{left} {at:.1}H{right}\"/>");
        let (text, at) = (short(tick), at + 4.0);
        let _ = writeln!(
            svg,
            "<text class=\"ink\" x=\"{beside}\" y=\"{at:.1}\" text-anchor=\"end\">{text}</text>"
        );
    }
    let _ = writeln!(svg, "<path class=\"axis\" d=\"M{left} {top}V{bottom}H{right}\"/>");
    let (middle, below) = ((left + right) / 2.0, bottom + 38.0);
    let label = escaped(&chart.x.label);
    let _ = writeln!(
        svg,
        "<text class=\"ink\" x=\"{middle}\" y=\"{below}\" text-anchor=\"middle\">{label}</text>"
    );
    let (middle, label) = ((top + bottom) / 2.0, escaped(&chart.y.label));
    let _ = writeln!(
        svg,
        "<text class=\"ink\" transform=\"translate(20 {middle}) rotate(-90)\" text-anchor=\"middle\">{label}</text>"
    );
}

fn draw_series(svg: &mut String, series: &Series, places: &[(f64, f64)]) {
    let colour = series.colour % COLOURS.len();
    if series.line != Line::None && places.len() > 1 {
        let joined: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
        let dashes = if series.line == Line::Dashed { " stroke-dasharray=\"6 4\"" } else { "" };
        let _ = writeln!(svg, "<path class=\"l{colour}\"{dashes} d=\"M{}\"/>", joined.join("L"));
    }
    if series.markers {
        for &(x, y) in places {
            marker(svg, colour, x, y);
        }
    }
}

/// A circle, a square, a diamond or a triangle, by colour.
fn marker(svg: &mut String, colour: usize, x: f64, y: f64) {
    let shape = match colour % 4 {
        0 => format!("<circle class=\"m{colour}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"5\"/>"),
        1 => format!("<path class=\"m{colour}\" d=\"M{:.1} {:.1}h9v9h-9z\"/>", x - 4.5, y - 4.5),
        2 => format!("<path class=\"m{colour}\" d=\"M{x:.1} {:.1}l6 6l-6 6l-6 -6z\"/>", y - 6.0),
        _ => format!("<path class=\"m{colour}\" d=\"M{x:.1} {:.1}l6 10h-12z\"/>", y - 6.0),
    };
    svg.push_str(&shape);
    svg.push('\n');
}

/// Writes labels where they cover no marker and no other label: right, left, above or below of their points.
fn draw_labels(svg: &mut String, chart: &Chart, x: &Range, y: &Range) {
    let labelled = chart.series.iter().filter(|series| series.markers).flat_map(|series| &series.points);
    let shown: Vec<(&Point, f64, f64)> = labelled
        .filter(|p| can_show(x.scale, p.x) && can_show(y.scale, p.y))
        .map(|p| (p, x.place(p.x), y.place(p.y)))
        .collect();
    let mut taken: Vec<[f64; 4]> =
        shown.iter().map(|&(_, x, y)| [x - 6.0, y - 6.0, x + 6.0, y + 6.0]).collect();
    for (point, x, y) in shown.into_iter().filter(|(point, ..)| !point.label.is_empty()) {
        let width = point.label.chars().count() as f64 * LETTER;
        let corners = [
            (x + 9.0, y - LINE / 2.0),
            (x - 9.0 - width, y - LINE / 2.0),
            (x - width / 2.0, y - 8.0 - LINE),
            (x - width / 2.0, y + 8.0),
            (x + 9.0, y - 8.0 - LINE),
            (x + 9.0, y + 8.0),
        ];
        let free =
            corners.into_iter().map(|(left, top)| [left, top, left + width, top + LINE]).find(|label| {
                let inside = label[0] > LEFT
                    && label[2] < WIDTH - RIGHT
                    && label[1] > TOP
                    && label[3] < HEIGHT - BOTTOM;
                inside && !taken.iter().any(|other| overlap(label, other))
            });
        // A label without a place is left out: its point is in the table too.
        if let Some(label) = free {
            let (left, base, text) = (label[0], label[3] - 3.0, escaped(&point.label));
            let _ = writeln!(svg, "<text class=\"ink\" x=\"{left:.1}\" y=\"{base:.1}\">{text}</text>");
            taken.push(label);
        }
    }
}

fn overlap(a: &[f64; 4], b: &[f64; 4]) -> bool {
    a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]
}

fn draw_legend(svg: &mut String, series: &[Series]) {
    let (mut x, mut y) = (LEFT, HEIGHT - 28.0);
    for series in series.iter().filter(|series| !series.name.is_empty()) {
        let width = 48.0 + series.name.chars().count() as f64 * LETTER;
        if x > LEFT && x + width > WIDTH - RIGHT {
            (x, y) = (LEFT, y + 18.0);
        }
        let sample = |markers| Series { name: String::new(), points: Vec::new(), markers, ..*series };
        draw_series(svg, &sample(false), &[(x, y), (x + 24.0, y)]);
        draw_series(svg, &sample(series.markers), &[(x + 12.0, y)]);
        let (at, base, name) = (x + 30.0, y + 4.0, escaped(&series.name));
        let _ = writeln!(svg, "<text class=\"ink\" x=\"{at:.1}\" y=\"{base}\">{name}</text>");
        x += width;
    }
}

/// A number with three digits and the letter of its thousands.
fn short(value: f64) -> String {
    let units = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let (unit, letter) = units.into_iter().find(|&(unit, _)| value >= unit * 0.999_999).unwrap_or((1.0, ""));
    let scaled = value / unit;
    let digits = if scaled == 0.0 { 0 } else { (2 - scaled.log10().floor() as i32).clamp(0, 6) as usize };
    let text = format!("{scaled:.digits$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{letter}")
}

/// Text for XML; what no XML file may hold becomes a replacement character.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            _ if letter.is_control() || matches!(letter, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            _ => out.push(letter),
        }
    }
    out
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Asserts that `svg` is XML: tags that close in order, quoted attributes, escaped text.
    pub(in super::super) fn assert_well_formed(svg: &str) {
        let mut open: Vec<&str> = Vec::new();
        let mut rest = svg;
        while let Some(at) = rest.find('<') {
            let text = &rest[..at];
            assert!(!text.contains('>'), "a bare > in {text:?}");
            for entity in text.split('&').skip(1) {
                let name = entity.split(';').next().unwrap();
                assert!(["amp", "lt", "gt", "quot"].contains(&name), "&{name}");
            }
            assert!(!open.is_empty() || text.trim().is_empty(), "text outside of the root: {text:?}");
            let end = rest[at..].find('>').expect("a tag ends") + at;
            let tag = &rest[at + 1..end];
            rest = &rest[end + 1..];
            match tag.strip_prefix('/') {
                Some(name) => assert_eq!(open.pop(), Some(name)),
                None => {
                    let (tag, alone) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
                    let name = tag.split(' ').next().unwrap();
                    let quotes = tag.matches('"').count();
                    assert!(quotes % 2 == 0 && tag.matches("=\"").count() * 2 == quotes, "{tag}");
                    if !alone {
                        open.push(name);
                    }
                }
            }
        }
        assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest:?}");
    }

    /// Where the markers of a colour's circles stand.
    fn circles(svg: &str) -> Vec<(f64, f64)> {
        let number = |line: &str, key: &str| {
            let rest = line.split(&format!("{key}=\"")).nth(1).unwrap();
            rest.split('"').next().unwrap().parse().unwrap()
        };
        let lines = svg.lines().filter(|line| line.starts_with("<circle"));
        lines.map(|line| (number(line, "cx"), number(line, "cy"))).collect()
    }

    fn chart(scale: Scale, points: &[(f64, f64)]) -> Chart {
        let axis = |label: &str| Axis { label: label.to_owned(), scale, ticks: Vec::new() };
        let points = points.iter().map(|&(x, y)| Point { x, y, label: format!("{x}") }).collect();
        Chart {
            title: "a < b & \"c\"\u{1}".to_owned(),
            x: axis("x"),
            y: axis("y"),
            series: vec![Series {
                name: "s".to_owned(),
                colour: 0,
                line: Line::Solid,
                markers: true,
                points,
            }],
        }
    }

    #[test]
    fn charts_are_well_formed_and_points_lie_inside_the_axes() {
        let cases: [&[(f64, f64)]; 6] = [
            &[],
            &[(3.0, 7.0)],
            &[(1.0, 0.001), (17.0, 123_456.0)],
            &[(0.0, 0.0), (1.0, -1.0), (2.0, f64::NAN), (f64::INFINITY, 3.0), (5.0, 5.0)],
            &[(1e-9, 1e15), (1e9, 1e-15)],
            &[(2.0, 2.0), (2.0, 2.0), (2.0, 2.0), (2.0, 2.0), (2.0, 2.0), (2.0, 2.0), (2.0, 2.0)],
        ];
        for (points, scale) in
            cases.into_iter().flat_map(|points| [(points, Scale::Linear), (points, Scale::Log)])
        {
            let svg = page("t", "", &[chart(scale, points)]);
            assert_well_formed(&svg);
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            // The last is the legend's.
            let places = circles(&svg);
            let places = &places[..places.len() - 1];
            let shown = points.iter().filter(|(x, y)| can_show(scale, *x) && can_show(scale, *y)).count();
            assert_eq!(places.len(), shown, "{points:?}");
            for &(x, y) in places {
                assert!(
                    (LEFT..=WIDTH - RIGHT).contains(&x) && (TOP..=HEIGHT - BOTTOM).contains(&y),
                    "{points:?}"
                );
            }
        }
    }

    #[test]
    fn places_follow_the_scale() {
        let svg = page("t", "", &[chart(Scale::Log, &[(1.0, 1.0), (10.0, 10.0), (100.0, 100.0)])]);
        let places = circles(&svg);
        let middle = ((places[0].0 + places[2].0) / 2.0, (places[0].1 + places[2].1) / 2.0);
        assert!((places[1].0 - middle.0).abs() < 0.2 && (places[1].1 - middle.1).abs() < 0.2);
        assert!(places[0].1 > places[2].1, "larger values stand higher");
    }

    #[test]
    fn ticks_are_round() {
        let axis = |scale| Axis { label: String::new(), scale, ticks: Vec::new() };
        let ticks = |scale, values: [f64; 2]| {
            let range = Range::over(values.into_iter(), &axis(scale), (0.0, 1.0));
            range.ticks(&axis(scale)).iter().map(|&tick| short(tick)).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(ticks(Scale::Linear, [0.0, 2367.0]), "0 500 1k 1.5k 2k 2.5k");
        assert_eq!(ticks(Scale::Linear, [0.0, 0.004]), "0 0.001 0.002 0.003 0.004");
        assert_eq!(ticks(Scale::Log, [3.0, 130.0]), "2 5 10 20 50 100 200");
        assert_eq!(ticks(Scale::Log, [3e9, 1.7e12]), "2G 5G 10G 20G 50G 100G 200G 500G 1T 2T");
        assert_eq!(ticks(Scale::Log, [1.0, 1e6]), "1 10 100 1k 10k 100k 1M");
    }
}
