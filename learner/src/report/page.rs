//! HTML page of a report.

use super::{
    chart::{Axis, Chart, STYLES, Series, mark, number, thinning},
    curves::Point,
    html::{base64, each, escape},
    run::{Evaluation, Run, Video},
    series::{Difference, differences, group},
};

const STYLE: &str = include_str!("style.css");
/// Content security policy: the page loads nothing and runs no script, whatever its content.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; img-src data:";
/// Largest number of differing keys in the legend; more keys are in the table only.
const LEGEND_KEYS: usize = 3;

/// Renders the page about `runs`.
pub(super) fn page(runs: &[Run]) -> String {
    let series = group(runs);
    let different = differences(&series);
    let title = format!(
        "{} {}",
        if runs.len() == 1 { "Run" } else { "Runs" },
        listed(&names(runs.iter()))
    );
    let title = escape(&title);
    [
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n".to_owned(),
        format!("<meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\n"),
        "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n".to_owned(),
        format!("<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"),
        curves(&series, &different),
        numbers(&series),
        videos(runs),
        configuration(&series, &different),
        "</body>\n</html>\n".to_owned(),
    ]
    .concat()
}

fn names<'a>(runs: impl Iterator<Item = &'a Run>) -> Vec<&'a str> {
    runs.map(|r| r.name.as_str()).collect()
}

/// Lists up to four names; of more names, the first and the last.
fn listed(names: &[&str]) -> String {
    match names {
        [first, _, _, _, .., last] => format!("{first} to {last} ({} runs)", names.len()),
        few => few.join(", "),
    }
}

fn label(series: &[&Run]) -> String {
    listed(&names(series.iter().copied()))
}

/// Charts of one kind of curve, over episodes and over wall time.
struct Stage {
    heading: &'static str,
    title: &'static str,
    points: fn(&Run) -> &[Point],
    ids: [&'static str; 2],
    /// Whether the points are marked, for curves with few points.
    marks: bool,
}

/// Renders line and mark of a series for the legend.
fn key(style: usize) -> String {
    let style = style % STYLES;
    format!(
        r#"<svg class="key" viewBox="0 0 32 12" aria-hidden="true"><path class="mean s{style}" d="M0 6H32"/><path class="mark s{style}" transform="translate(16 6)" d="{}"/></svg>"#,
        mark(style)
    )
}

fn seed(run: &Run) -> &str {
    run.config.get("runner.seed").map_or("\u{2013}", String::as_str)
}

fn curves(series: &[Vec<&Run>], different: &[Difference<'_>]) -> String {
    let legend = each(series.iter().enumerate(), |(i, members)| {
        let mut notes = Vec::new();
        if members.len() > 1 {
            let seeds: Vec<&str> = members.iter().map(|r| seed(r)).collect();
            notes.push(format!(
                "mean and range of {} runs, seeds {}",
                members.len(),
                seeds.join(", ")
            ));
        }
        if different.len() <= LEGEND_KEYS {
            let values = different
                .iter()
                .map(|(k, values)| (k, values.get(i).copied().flatten()));
            notes.extend(values.map(|(k, v)| format!("{k} = {}", v.unwrap_or("absent"))));
        }
        let notes = each(notes, |n| format!("<small>{}</small>", escape(&n)));
        format!("<li>{}<div>{}{notes}</div></li>\n", key(i), escape(&label(members)))
    });
    let all = || series.iter().flatten();
    let most = all().map(|r| r.seconds()).fold(0.0, f64::max);
    let (unit, short) = unit(most);
    let stages = [
        Stage {
            heading: "On unseen episodes, without noise (ODE)",
            title: "Success on unseen episodes",
            points: |r| &r.eval,
            ids: ["evalepisodes", "evaltime"],
            marks: true,
        },
        Stage {
            heading: "In training, sampled with the exploration noise",
            title: "Success in training",
            points: |r| &r.train,
            ids: ["trainepisodes", "traintime"],
            marks: false,
        },
    ];
    let charts = each(stages, |stage| {
        let points = stage.points;
        if all().all(|r| points(r).is_empty()) {
            return String::new();
        }
        let axes = [
            (
                "training episodes",
                Axis {
                    label: "training episodes".to_owned(),
                    unit: 1.0,
                    short: "episodes",
                },
                (|p| (p.episodes, p.success)) as fn(&Point) -> (f64, f64),
            ),
            (
                "wall time",
                Axis {
                    label: format!("wall time of training ({short})"),
                    unit,
                    short,
                },
                |p| (p.seconds, p.success),
            ),
        ];
        let figures = each(axes.into_iter().zip(stage.ids), |((over, axis, place), id)| {
            let drawn = series.iter().enumerate().map(|(style, members)| Series {
                style,
                label: label(members),
                runs: members
                    .iter()
                    .filter(|r| !points(r).is_empty())
                    .map(|r| (r.name.clone(), rising(points(r), place)))
                    .collect(),
            });
            let chart = Chart {
                id,
                title: format!("{} over {over}", stage.title),
                axis,
                marks: stage.marks,
                series: drawn.filter(|s| !s.runs.is_empty()).collect(),
            };
            format!("<figure>{}</figure>\n", chart.svg())
        });
        format!("<h3>{}</h3>\n<div class=\"charts\">\n{figures}</div>\n", stage.heading)
    });
    let longest = all().map(|r| thinning(r.train.len())).max().unwrap_or(1);
    let mut notes = vec!["Rest the pointer on a line for its numbers.".to_owned()];
    if series.iter().any(|s| s.len() > 1) {
        let text = "Where a series has several runs, the thick line is their mean, as far as all of them reach, the band goes from the \
                    lowest to the highest, and the thin lines are the runs.";
        notes.push(text.to_owned());
    }
    if longest > 1 {
        notes.push(format!(
            "Long curves are averaged over up to {longest} neighboring points."
        ));
    }
    let notes = notes.join(" ");
    format!("<h2>Success rate</h2>\n<p>{notes}</p>\n<ul class=\"legend\">\n{legend}</ul>\n{charts}")
}

/// Returns the points of a chart by ascending x, one point per x.
fn rising(points: &[Point], place: fn(&Point) -> (f64, f64)) -> Vec<(f64, f64)> {
    let mut out: Vec<(f64, f64)> = points.iter().map(place).collect();
    out.sort_by(|a, b| a.0.total_cmp(&b.0));
    out.dedup_by(|next, kept| {
        let same = next.0 <= kept.0;
        if same {
            *kept = *next;
        }
        same
    });
    out
}

/// Returns the unit of a time axis that ends at `seconds`, with its length in seconds.
fn unit(seconds: f64) -> (f64, &'static str) {
    match seconds {
        s if s <= 120.0 => (1.0, "s"),
        s if s <= 7200.0 => (60.0, "min"),
        _ => (3600.0, "h"),
    }
}

fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

const ABSENT: &str = "\u{2013}";

fn numbers(series: &[Vec<&Run>]) -> String {
    let head = [
        ("Run", ""),
        ("Seed", "n"),
        ("Iterations", "n"),
        ("Episodes", "n"),
        ("Wall time", "n"),
        ("First validation", "n"),
        ("Last validation", "n"),
        ("Final: before", "n"),
        ("Final: after", "n"),
    ];
    let head = each(head, |(name, class)| {
        format!("<th scope=\"col\" class=\"{class}\">{name}</th>")
    });
    let body = each(series.iter().enumerate(), |(style, members)| {
        let rows = each(members, |run| row(style, run));
        format!("<tbody>\n{rows}{}</tbody>\n", summary(style, members))
    });
    let unreadable = each(series.iter().flatten().filter(|r| r.unreadable > 0), |run| {
        format!(
            "<p>{}: lines of <code>metrics.jsonl</code> that could not be read: {}.</p>\n",
            escape(&run.name),
            run.unreadable
        )
    });
    format!(
        "<h2>Numbers</h2>\n<p>Validation is the success on unseen episodes that training measures now and then; final is \
         <code>eval.json</code> (<code>learner eval --json</code>), its lowest and its highest policy version. In brackets: episodes \
         measured.</p>\n<div class=\"wide\" tabindex=\"0\"><table>\n<thead><tr>{head}</tr></thead>\n{body}</table></div>\n{unreadable}"
    )
}

fn rate(success: f64, episodes: Option<u64>) -> String {
    episodes.map_or_else(|| format!("{success:.3}"), |n| format!("{success:.3} ({n})"))
}

/// Returns the evaluation before training: the lowest version of `eval.json`, `None` for a single entry.
fn before(run: &Run) -> Option<&Evaluation> {
    run.evaluations.first().filter(|_| run.evaluations.len() > 1)
}

/// Returns the evaluation after training: the highest version of `eval.json`.
fn after(run: &Run) -> Option<&Evaluation> {
    run.evaluations.last()
}

fn row(style: usize, run: &Run) -> String {
    let planned = run.config.get("runner.max_epochs").and_then(|v| v.parse::<u64>().ok());
    let iterations = match planned {
        Some(all) if run.iterations < all => format!("{} of {all}", run.iterations),
        _ => run.iterations.to_string(),
    };
    let validation = |p: Option<&Point>| p.map_or_else(|| ABSENT.to_owned(), |p| rate(p.success, run.eval_episodes));
    let end = |e: Option<&Evaluation>| e.map_or_else(|| ABSENT.to_owned(), |e| rate(e.success, Some(e.episodes)));
    let cells = [
        escape(seed(run)),
        iterations,
        number(run.episodes(), 1.0),
        duration(run.seconds()),
        validation(run.eval.first()),
        validation(run.eval.last()),
        end(before(run)),
        end(after(run)),
    ];
    format!(
        "<tr><th scope=\"row\" class=\"name-cell\">{}{}</th>{}</tr>\n",
        key(style),
        escape(&run.name),
        each(cells, |c| format!("<td class=\"n\">{c}</td>"))
    )
}

/// Renders mean and range of a series of several runs.
fn summary(style: usize, members: &[&Run]) -> String {
    if members.len() < 2 {
        return String::new();
    }
    let over = |value: &dyn Fn(&Run) -> Option<f64>| {
        let values: Vec<f64> = members.iter().filter_map(|r| value(r)).collect();
        if values.is_empty() {
            return ABSENT.to_owned();
        }
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let of = if values.len() < members.len() {
            format!("<small>{} of {} runs</small>", values.len(), members.len())
        } else {
            String::new()
        };
        format!("{mean:.3}<small>{low:.3} to {high:.3}</small>{of}")
    };
    let success = |p: Option<&Point>| p.map(|p| p.success);
    let cells = [
        over(&|r| success(r.eval.first())),
        over(&|r| success(r.eval.last())),
        over(&|r| before(r).map(|e| e.success)),
        over(&|r| after(r).map(|e| e.success)),
    ];
    format!(
        "<tr class=\"sum\"><th scope=\"row\" colspan=\"5\" class=\"name-cell\">{}Mean and range of {} runs</th>{}</tr>\n",
        key(style),
        members.len(),
        each(cells, |c| format!("<td class=\"n\">{c}</td>"))
    )
}

fn videos(runs: &[Run]) -> String {
    let figures = each(runs, |run| match &run.video {
        Video::Gif(bytes) => {
            let name = escape(&run.name);
            format!(
                "<figure><figcaption>{name}</figcaption><img alt=\"An evaluation episode of {name}\" src=\"data:image/gif;base64,{}\"></figure>\n",
                base64(bytes)
            )
        }
        Video::Absent | Video::LeftOut(_) => String::new(),
    });
    let without: Vec<&str> = names(runs.iter().filter(|r| r.video == Video::Absent));
    let absent = if without.is_empty() {
        String::new()
    } else {
        format!(
            "<p>Without an <code>eval.gif</code> (<code>learner eval --gif</code> writes one): {}.</p>\n",
            escape(&without.join(", "))
        )
    };
    let left_out = each(runs, |run| match &run.video {
        Video::LeftOut(why) => format!(
            "<p>{}: <code>eval.gif</code> is left out, {}.</p>\n",
            escape(&run.name),
            escape(why)
        ),
        Video::Absent | Video::Gif(_) => String::new(),
    });
    let figures = if figures.is_empty() {
        figures
    } else {
        format!("<div class=\"videos\">\n{figures}</div>\n")
    };
    format!("<h2>Evaluation episodes</h2>\n{figures}{absent}{left_out}")
}

fn configuration(series: &[Vec<&Run>], different: &[Difference<'_>]) -> String {
    let heading = "<h2>Configuration differences</h2>\n";
    if series.len() < 2 {
        return format!("{heading}<p>None, apart from the seed and keys that change no weight.</p>\n");
    }
    let head = each(series.iter().enumerate(), |(style, members)| {
        format!(
            "<th scope=\"col\" class=\"name-cell\">{}{}</th>",
            key(style),
            escape(&label(members))
        )
    });
    let rows = each(different, |(name, values)| {
        let cells = each(values, |value| match value {
            Some(value) => format!("<td><code>{}</code></td>", escape(value)),
            None => "<td class=\"none\">absent</td>".to_owned(),
        });
        format!("<tr><th scope=\"row\"><code>{}</code></th>{cells}</tr>\n", escape(name))
    });
    format!(
        "{heading}<p>All keys that differ, but for the seed and keys that change no weight.</p>\n<div class=\"wide\" tabindex=\"0\"><table>\n\
         <thead><tr><th scope=\"col\">Key</th>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n"
    )
}
