//! `learner report`: one page for runs with any content.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use integration_tests::ring::program;

fn report(args: &[&Path]) -> Output {
    Command::new(program("learner"))
        .arg("report")
        .args(args)
        .output()
        .expect("running the program")
}

/// Writes a run of two iterations: success `first` before, `last` after, each iteration 60 s and 100 episodes.
fn run(dir: &Path, seed: u32, extra: &str, first: f64, last: f64) -> PathBuf {
    fs::create_dir_all(dir.join("tensorboard")).expect("folder");
    fs::write(dir.join("tensorboard/events.out.tfevents.1000.1"), "").expect("event file");
    let output_dir = dir.display();
    let config = format!(
        "[runner]\noutput_dir = {:?}\nseed = {seed}\nmax_epochs = 3\n{extra}",
        output_dir.to_string()
    );
    fs::write(dir.join("config.toml"), config).expect("configuration");
    let line = |stage: &str, step: u64, seconds: u64, success: f64| {
        serde_json::json!({
            "stage": stage, "step": step, "episodes": 100 * step, "wall_time": 1000 + seconds,
            "success": success, "eval_episodes": 64,
        })
        .to_string()
    };
    let lines = [
        line("eval", 0, 0, first),
        line("train", 1, 60, first),
        line("train", 2, 120, last),
        line("eval", 2, 120, last),
    ];
    // the process was killed during the write
    fs::write(dir.join("metrics.jsonl"), lines.join("\n") + "\n{\"stage\":\"tr").expect("metrics");
    dir.to_owned()
}

/// Returns the names of the elements and all attributes of a page; fails if an element is not closed.
fn elements(page: &str) -> (Vec<String>, Vec<String>) {
    let (mut names, mut attributes, mut open) = (Vec::new(), Vec::new(), Vec::new());
    // the style sheet has no markup, but `>` may stand in it
    let (before, rest) = page.split_once("<style>").expect("style");
    let (style, after) = rest.split_once("</style>").expect("style");
    assert!(
        !style.contains("url(") && !style.contains("@import"),
        "the style loads nothing"
    );
    let page = format!("{before}{after}");
    for tag in page.split('<').skip(1) {
        let (tag, _) = tag.split_once('>').expect("a tag is closed");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name), "elements are nested");
            continue;
        }
        let (name, rest) = tag.split_once(' ').unwrap_or((tag, ""));
        let void = tag.ends_with('/') || ["!doctype", "meta", "img"].contains(&name);
        if !void {
            open.push(name.to_owned());
        }
        names.push(name.to_owned());
        // NAME="VALUE" NAME="VALUE": every second piece is a name
        attributes.extend(
            rest.split('"')
                .step_by(2)
                .map(|a| a.trim_matches([' ', '=', '/']).to_owned()),
        );
    }
    assert_eq!(open, Vec::<String>::new(), "all elements are closed");
    attributes.retain(|a| !a.is_empty());
    (names, attributes)
}

#[test]
fn seeds_are_averaged_and_the_page_stands_alone() {
    let dir = tempfile::tempdir().expect("folder");
    let noise = |level: &str| format!("[actor]\nnoise_level = {level}\n");
    let runs = [
        run(&dir.path().join("a1"), 1, &noise("0.5"), 0.2, 0.6),
        run(&dir.path().join("a2"), 2, &noise("0.5"), 0.4, 1.0),
        run(&dir.path().join("b1"), 1, &noise("0.8"), 0.1, 0.3),
    ];
    let evaluations = r#"[{"version":2,"success":0.75,"episodes":200},{"version":0,"success":0.25,"episodes":200}]"#;
    fs::write(runs[0].join("eval.json"), evaluations).expect("eval.json");
    fs::write(runs[2].join("eval.gif"), b"GIF89a").expect("eval.gif");
    let mut args: Vec<&Path> = runs.iter().map(PathBuf::as_path).collect();
    let picture = dir.path().join("curves.png");
    args.extend([Path::new("--picture"), &picture]);
    let output = report(&args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let page = dir.path().join("report.html");
    assert!(fs::read(picture).expect("picture").starts_with(b"\x89PNG"));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        page.display().to_string()
    );
    let page = fs::read_to_string(page).expect("page");
    // seeds 1 and 2: 0.2 and 0.4 before, 0.6 and 1 after
    for fact in [
        "mean and range of 2 runs, seeds 1, 2",
        "a1, a2: 0.30 (mean; 0.20 to 0.40) at 0 episodes",
        "a1, a2: 0.80 (mean; 0.60 to 1.00) at 200 episodes",
        "a1, a2: 0.80 (mean; 0.60 to 1.00) at 120 s",
        "b1: 0.30 at 200 episodes",
        "<td class=\"n\">0.800<small>0.600 to 1.000</small></td>",
        // eval.json by version, whatever its order
        "<td class=\"n\">0.250 (200)</td><td class=\"n\">0.750 (200)</td>",
        "<td class=\"n\">2 of 3</td><td class=\"n\">200</td><td class=\"n\">2 min 00 s</td>",
        // the only difference between the two series
        "<code>actor.noise_level</code></th><td><code>0.5</code></td><td><code>0.8</code></td>",
        // RFC 4648 of "GIF89a"
        "src=\"data:image/gif;base64,R0lGODlh\"",
        "could not be read: 1.",
    ] {
        assert!(page.contains(fact), "`{fact}` is not in the page:\n{page}");
    }
    assert!(
        !page.contains("<code>runner."),
        "what all runs share or may differ in is not listed"
    );
    assert!(!page.contains("://"), "the page refers to nothing outside");
    let (names, attributes) = elements(&page);
    assert!(
        !names.iter().any(|n| ["script", "link", "iframe"].contains(&n.as_str())),
        "{names:?}"
    );
    assert!(
        !attributes.iter().any(|a| a == "href" || a.starts_with("on")),
        "{attributes:?}"
    );
}

#[test]
fn hostile_names_and_values_stay_text() {
    let plain = tempfile::tempdir().expect("folder");
    let hostile = tempfile::tempdir().expect("folder");
    let page = |dir: &Path, name: &str, value: &str| {
        let value = toml_string(value);
        let first = run(&dir.join(name), 1, &format!("[env]\nname = {value}\n"), 0.1, 0.2);
        let second = run(&dir.join("other"), 1, "", 0.1, 0.2);
        let out = dir.join("page.html");
        let output = report(&[&first, &second, Path::new("--out"), &out]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::read_to_string(out).expect("page")
    };
    let attack = "\"'><script>alert(1)<&lt;";
    let wanted = elements(&page(plain.path(), "name", "value"));
    let text = page(hostile.path(), attack, attack);
    assert_eq!(elements(&text), wanted, "text of the runs changes no markup");
    assert!(
        text.contains("&quot;&#39;&gt;&lt;script&gt;alert(1)&lt;&amp;lt;"),
        "{text}"
    );
}

/// Returns `text` as a TOML string.
fn toml_string(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

#[track_caller]
fn assert_refused(args: &[&Path], wanted: &[&str], page: &Path) {
    let output = report(args);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "it did not fail: {text}");
    assert_eq!(text.trim().lines().count(), 1, "one line: {text}");
    for part in wanted {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
    assert!(!page.exists(), "no page is left");
}

#[test]
fn a_run_that_cannot_be_shown_is_named() {
    let dir = tempfile::tempdir().expect("folder");
    let page = dir.path().join("report.html");
    let good = run(&dir.path().join("good"), 1, "", 0.1, 0.2);
    let bad = dir.path().join("bad");
    assert_refused(&[&good, &bad], &["bad", "No such file"], &page);
    fs::create_dir(&bad).expect("folder");
    assert_refused(&[&good, &bad], &["bad", "metrics.jsonl", "learner train"], &page);
    fs::write(
        bad.join("metrics.jsonl"),
        "{\"stage\":\"sft\",\"step\":1,\"wall_time\":1,\"loss\":2}\n",
    )
    .expect("metrics");
    assert_refused(&[&good, &bad], &["bad", "success", "learner train"], &page);
    run(&bad, 1, "", 0.1, 0.2);
    fs::write(bad.join("eval.json"), "{}").expect("eval.json");
    assert_refused(&[&good, &bad], &["bad", "eval.json"], &page);
    fs::write(bad.join("config.toml"), "runner = [").expect("config.toml");
    assert_refused(&[&good, &bad], &["bad", "config.toml", "TOML"], &page);
    assert_refused(&[&good, &good.join("../good")], &["good", "twice"], &page);
}
