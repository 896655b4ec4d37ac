//! Both rules on small made-up crates.

use std::fs;

use crate::{graph::arrows, judge::judge, source::modules};

/// Returns the direction and the errors of a crate of these files, the root first; folders are removed from the texts.
fn check(files: &[(&str, &str)]) -> (String, Vec<String>) {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, text) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("creating a folder");
        fs::write(path, text).expect("writing a source");
    }
    let modules = modules(&folder.path().join(files[0].0)).expect("sources");
    let verdict = judge(&modules, &arrows(&modules));
    let short = |text: String| text.replace(&format!("{}/", folder.path().display()), "");
    (verdict.direction, verdict.errors.into_iter().map(short).collect())
}

/// Returns the errors of a crate.
fn errors(files: &[(&str, &str)]) -> Vec<String> {
    check(files).1
}

#[test]
fn a_circle_names_files_lines_and_names() {
    let found = errors(&[
        ("lib.rs", "mod a;\nmod b;\nmod c;"),
        ("a.rs", "use crate::c::Third;\npub fn first(_: Third) {}"),
        ("b.rs", "\npub fn second() { super::a::first(todo!()) }"),
        ("c.rs", "pub struct Third;\nfn third() {\n    crate::b::second()\n}"),
    ]);
    let circle = "a circle between 3 files, a.rs, b.rs, c.rs:\n    \
         a.rs uses c.rs: `Third` (line 1, defined in line 1)\n    \
         b.rs uses a.rs: `first` (line 2, defined in line 2)\n    \
         c.rs uses b.rs: `second` (line 3, defined in line 2)";
    assert_eq!(found[0], circle);
    assert_eq!(
        found.len(),
        2,
        "one of the three arrows also stands against the order: {found:?}"
    );
}

#[test]
fn most_arrows_make_the_direction_and_the_others_are_errors() {
    let files = [
        ("lib.rs", "mod a;\nmod b;\nmod c;\nmod d;"),
        ("a.rs", "pub fn a() {}"),
        ("b.rs", "use crate::{a, d::d};\nfn b() { a::a(); d() }"),
        ("c.rs", "fn c() { crate::a::a() }"),
        ("d.rs", "pub fn d() {}"),
    ];
    let (direction, found) = check(&files);
    assert_eq!(direction, "what is used stands above (2 of 3 arrows)");
    assert_eq!(
        found,
        [
            "`b` (line 2) uses `d` (line 4) against the order of lib.rs, where what is used stands above:\n    \
          b.rs uses d.rs: `d` (line 1, defined in line 1)"
        ]
    );
    let down = check(&[
        ("main.rs", "mod a;\nmod b;\nfn main() { a::a() }"),
        ("a.rs", "pub fn a() { crate::b::b() }"),
        ("b.rs", "pub fn b() {}"),
    ]);
    assert_eq!(
        down,
        ("what is used stands below (1 of 1 arrows)".to_owned(), Vec::new())
    );
}

#[test]
fn a_folder_keeps_the_direction_of_its_crate() {
    let found = errors(&[
        ("lib.rs", "pub mod a;\npub mod b;"),
        ("a.rs", "pub fn a() {}"),
        ("b/mod.rs", "mod x;\nmod y { pub fn y() {} }\nmod z;"),
        ("b/x.rs", "fn x() { crate::a::a(); super::z::z() }"),
        ("b/z.rs", "pub fn z() { crate::a::a() }"),
    ]);
    assert_eq!(
        found,
        [
            "`x` (line 1) uses `z` (line 3) against the order of b/mod.rs, where what is used stands above:\n    \
          b/x.rs uses b/z.rs: `z` (line 1, defined in line 1)"
        ]
    );
}

#[test]
fn what_only_tests_compile_is_left_out() {
    let found = errors(&[
        ("lib.rs", "mod a;\nmod b;\n#[cfg(test)]\nmod tests;"),
        (
            "a.rs",
            "pub fn a() {}\n#[cfg(test)]\nuse crate::b::b;\n#[cfg(all(test, unix))]\nmod tests { fn t() { crate::b::b() } }\n\
                  #[test]\nfn t() { b() }\nstruct S;\nimpl S {\n#[cfg(test)]\nfn t() { crate::b::b() }\n}",
        ),
        ("b.rs", "pub fn b() { crate::a::a() }"),
    ]);
    assert_eq!(found, Vec::<String>::new(), "`tests` has no file and is not looked for");
    let compiled = errors(&[
        ("lib.rs", "mod a;\nmod b;"),
        ("a.rs", "pub fn a() {}\n#[cfg(not(test))]\nfn t() { crate::b::b() }"),
        ("b.rs", "pub fn b() { crate::a::a() }"),
    ]);
    assert_eq!(compiled.len(), 2, "{compiled:?}");
}

#[test]
fn a_re_export_leads_to_the_definition() {
    let parent = "mod x;\nmod y;\npub use self::x::{X as Known, *};\npub struct Own;";
    let files = |y| {
        [
            ("lib.rs", "mod a;"),
            ("a/mod.rs", parent),
            ("a/x.rs", "pub struct X;\npub fn all(_: super::Own) {}"),
            ("a/y.rs", y),
        ]
    };
    let good = check(&files("use super::{Known, all};"));
    assert_eq!(
        good,
        ("what is used stands above (1 of 1 arrows)".to_owned(), Vec::new()),
        "`y` uses `x`, and a parent that re-exports uses nothing"
    );
    let mut used = files("");
    used[1].1 = "mod x;\nmod y;\nuse self::x::all;\npub struct Own;";
    assert!(
        errors(&used)[0].starts_with("a circle between 2 files, a/mod.rs, a/x.rs:"),
        "a parent that uses a child"
    );
}

#[test]
fn macros_attributes_and_names_of_other_crates() {
    let found = check(&[
        ("lib.rs", "mod a;\nmod serde;\nmod b;\nmod c;"),
        (
            "a.rs",
            "use std::fmt;\nuse other::c::Thing;\nfn a(x: Thing) { x.c(); fmt::c(); println!(\"{}\", x.c) }",
        ),
        ("serde.rs", "pub fn read() {}"),
        (
            "b.rs",
            "#[derive(Clone)]\nstruct B {\n#[serde(with = \"crate::serde\", default = \"crate::serde::read\")]\nb: u8 }",
        ),
        ("c.rs", "pub fn c() { assert_eq!(1, crate::serde::read()) }"),
    ]);
    assert_eq!(
        found,
        ("what is used stands above (2 of 2 arrows)".to_owned(), Vec::new())
    );
}

#[test]
fn a_module_without_a_file_is_an_error() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path().join("lib.rs");
    fs::write(&root, "mod gone;").expect("writing a source");
    let error = modules(&root).expect_err("a missing file").to_string();
    assert!(
        error.contains("failed to find module `gone`") && error.contains("gone/mod.rs"),
        "{error}"
    );
}
