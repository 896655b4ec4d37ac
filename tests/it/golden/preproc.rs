//! Compares pre- and post-processing with the recorded reference: images, normalization, delta actions, discrete state, prompts and
//! `SentencePiece` ids.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeSet, path::PathBuf};

use integration_tests::{Array, Golden, assert_close, golden_cases};
use policy::{
    image::{RgbImage, normalise_u8, resize_with_pad},
    norm::{DimStats, Normalization, absolute_from_delta, bool_mask, delta_from_absolute},
    prompt::{PromptTokens, Tokenizer, clean, discretize_state, pi05_prompt},
};
use serde_json::Value;

/// Returns the tensor names of the golden file that start with `prefix` and end with `.in`, without `.in`.
fn stems(golden: &Golden, prefix: &str) -> Vec<String> {
    let names = golden.names();
    let found: Vec<String> = names
        .iter()
        .filter(|n| n.starts_with(prefix))
        .filter_map(|n| n.strip_suffix(".in"))
        .map(str::to_owned)
        .collect();
    assert!(!found.is_empty(), "no golden tensor `{prefix}*.in`");
    found
}

fn bytes(array: &Array) -> Vec<u8> {
    array.data.iter().map(|v| *v as u8).collect()
}

/// Transposes `[h, w, c]` to `[c, h, w]`.
fn planes(pixels: &[f32], channels: usize) -> Vec<f32> {
    (0..channels)
        .flat_map(|c| pixels.iter().skip(c).step_by(channels).copied())
        .collect()
}

#[test]
fn byte_images_are_resized_to_the_same_bytes() {
    let golden = Golden::open("preproc");
    for stem in stems(&golden, "pil") {
        let (input, want) = (golden.get(&format!("{stem}.in")), golden.get(&format!("{stem}.out")));
        let image = RgbImage::new(input.shape[0], input.shape[1], bytes(&input)).unwrap();
        let got = resize_with_pad(&image, want.shape[0], want.shape[1]).unwrap();
        assert_eq!((got.height(), got.width()), (want.shape[0], want.shape[1]), "{stem}");
        let differing = got.data().iter().zip(bytes(&want)).filter(|(g, w)| **g != *w).count();
        assert_eq!(differing, 0, "{stem}: bytes that differ, of {}", want.data.len());
    }
}

#[test]
fn bytes_become_the_same_floats() {
    let golden = Golden::open("preproc");
    let (input, want) = (golden.get("u8norm.in"), golden.get("u8norm.out"));
    let (channels, each) = (input.shape[3], input.shape[1..].iter().product());
    let pixels: Vec<f32> = bytes(&input).into_iter().map(normalise_u8).collect();
    let got: Vec<f32> = pixels
        .chunks_exact(each)
        .flat_map(|image| planes(image, channels))
        .collect();
    assert_close("u8norm", &got, &want, 0.0);
}

fn stats(golden: &Golden, which: &str) -> DimStats {
    let values = |field: &str| golden.get(&format!("norm.{which}.{field}")).data;
    DimStats {
        mean: values("mean"),
        std: values("std"),
        q01: Some(values("q01")),
        q99: Some(values("q99")),
    }
}

/// Asserts that each value is within f32 rounding (2^-24, twice because the recorded value is rounded too); columns differ by many
/// magnitudes.
#[track_caller]
fn assert_rows(what: &str, want: &Array, row: impl Fn(usize) -> Vec<f32>) {
    let width = *want.shape.last().unwrap();
    for (index, expected) in want.data.chunks_exact(width).enumerate() {
        let got = row(index);
        assert_eq!(got.len(), width, "{what}: width");
        for (column, (g, w)) in got.iter().zip(expected).enumerate() {
            let error = (f64::from(*g) - w).abs();
            assert!(
                error <= w.abs() * 1.2e-7,
                "{what}[{index}, {column}]: {g}, expected {w}"
            );
        }
    }
}

#[test]
fn state_and_actions_are_normalised_and_back() {
    let golden = Golden::open("preproc");
    for which in ["state", "actions"] {
        let stats = stats(&golden, which);
        let get = |field: &str| golden.get(&format!("norm.{which}.{field}"));
        let (x, y) = (get("x"), get("y32"));
        let row = |array: &Array, i: usize| {
            array
                .data
                .chunks_exact(*array.shape.last().unwrap())
                .nth(i)
                .unwrap()
                .to_vec()
        };
        for (kind, forth, back) in [
            (Normalization::ZScore, "zscore", "unzscore"),
            (Normalization::Quantile, "quantile", "unquantile"),
        ] {
            assert_rows(&format!("{which} {forth}"), &get(forth), |i| {
                kind.normalize(&stats, &row(&x, i)).unwrap()
            });
            assert_rows(&format!("{which} {back}"), &get(back), |i| {
                kind.unnormalize(&stats, &row(&y, i)).unwrap()
            });
        }
    }
}

#[test]
fn delta_actions_are_made_and_undone() {
    let golden = Golden::open("preproc");
    let (actions, state) = (golden.get("delta.actions"), golden.get("delta.state").data);
    let (delta, absolute) = (golden.get("delta.out"), golden.get("absolute.out"));
    let cases = golden_cases("preproc");
    // the mask is in the name of the recorded call
    let names = cases["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["fn"].as_str().unwrap());
    let masks: BTreeSet<&str> = names
        .filter_map(|name| Some(name.split_once("make_bool_mask(")?.1.split_once(')')?.0))
        .collect();
    assert_eq!(masks.len(), 1, "one mask is recorded: {masks:?}");
    let mask = masks.first().unwrap();
    let runs: Vec<i32> = mask.split(',').map(|n| n.trim().parse().unwrap()).collect();
    let mask = bool_mask(&runs);
    let width = *actions.shape.last().unwrap();
    let row = |array: &Array, i: usize| array.data[i * width..(i + 1) * width].to_vec();
    // differences of values near 1: one f32 rounding of the result
    let got = |f: &dyn Fn(usize) -> Vec<f32>| (0..actions.shape[0]).flat_map(f).collect::<Vec<f32>>();
    let forth = got(&|i| delta_from_absolute(&row(&actions, i), &state, &mask).unwrap());
    assert_close("delta", &forth, &delta, 1e-6);
    // the recording adds the state to the same actions, it does not undo the deltas
    let added = got(&|i| absolute_from_delta(&row(&actions, i), &state, &mask).unwrap());
    assert_close("absolute", &added, &absolute, 1e-6);
    let undone = got(&|i| absolute_from_delta(&row(&delta, i), &state, &mask).unwrap());
    assert_close("undone", &undone, &actions, 1e-6);
}

#[test]
fn state_bins_are_those_of_the_reference() {
    let golden = Golden::open("preproc");
    assert_eq!(
        discretize_state(&golden.get("disc.state").data),
        golden.get("disc.bins").i64()
    );
    assert_eq!(
        discretize_state(&golden.get("disc.state_f32").f32()),
        golden.get("disc.bins_f32").i64()
    );
}

/// The recording used one id per character, so text, frame and padding are compared.
#[test]
fn prompts_have_the_recorded_text_frame_and_length() {
    let cases = golden_cases("preproc");
    let prompts = cases["prompts"].as_array().unwrap();
    assert!(!prompts.is_empty());
    for case in prompts {
        let (prompt, max_len) = (
            case["prompt"].as_str().unwrap(),
            case["max_len"].as_u64().unwrap() as usize,
        );
        let state: Option<Vec<f64>> = serde_json::from_value(case["state"].clone()).unwrap();
        let texts = match &state {
            Some(state) => vec![(pi05_prompt(prompt, state), true)],
            None => vec![(clean(prompt), true), ("\n".to_owned(), false)],
        };
        let recorded: Vec<(String, bool)> = serde_json::from_value(case["encode_calls"].clone()).unwrap();
        assert_eq!(texts, recorded);
        let ids = texts
            .iter()
            .map(|(text, bos)| text.chars().count() + usize::from(*bos))
            .sum();
        let tokens = PromptTokens::fit(vec![7; ids], max_len);
        assert_eq!(tokens.ids.len() as u64, case["len"].as_u64().unwrap(), "{prompt}");
        assert_eq!(
            tokens.mask.iter().filter(|m| **m).count() as u64,
            case["n_valid"].as_u64().unwrap(),
            "{prompt}"
        );
        let padding: BTreeSet<i64> = tokens
            .ids
            .iter()
            .zip(&tokens.mask)
            .filter(|(_, m)| !**m)
            .map(|(id, _)| *id)
            .collect();
        assert_eq!(padding, case["pad_value"].as_i64().into_iter().collect(), "{prompt}");
    }
}

/// Model and ids come from the reference library: `tests/data/sentencepiece/make.py` trains the model and records the ids, with the options
/// of `PaliGemma`'s tokenizer.
#[test]
fn sentencepiece_ids_are_those_of_the_reference_library() {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/data/sentencepiece"));
    let tokenizer = Tokenizer::from_sentencepiece(&folder.join("tokenizer.model")).unwrap();
    let recorded: Value = serde_json::from_slice(&std::fs::read(folder.join("cases.json")).unwrap()).unwrap();
    assert_eq!(tokenizer.vocab_size() as u64, recorded["vocab_size"].as_u64().unwrap());
    let cases: Vec<(String, Vec<i64>)> = serde_json::from_value(recorded["cases"].clone()).unwrap();
    assert!(!cases.is_empty());
    for (text, want) in &cases {
        assert_eq!(&tokenizer.encode(text, true).unwrap(), want, "{text:?}");
    }
    let ids = |text: &str| cases.iter().find(|(t, _)| t == text).unwrap().1.clone();
    let framed = tokenizer.tokenize(" pick_up the\nred block ", 48).unwrap();
    let want = [ids("pick up the red block"), ids("\n")[1..].to_vec()].concat();
    assert_eq!(framed, PromptTokens::fit(want, 48));
}

/// Every tensor and case of the file belongs to one of the tests above, except `trz`, the reference's resize of float images inside its
/// model. Here images are resized as bytes, before the conversion to floats.
#[test]
fn every_recorded_tensor_has_a_test() {
    let golden = Golden::open("preproc");
    let known = [
        "pil",
        "trz",
        "u8norm.",
        "norm.state.",
        "norm.actions.",
        "delta.",
        "absolute.",
        "disc.",
    ];
    for name in golden.names() {
        assert!(known.iter().any(|k| name.starts_with(k)), "`{name}` has no test");
    }
    let cases = golden_cases("preproc");
    for case in cases["cases"].as_array().unwrap() {
        let name = case["case"].as_str().unwrap();
        assert!(
            known
                .iter()
                .any(|k| k.starts_with(name) || name.starts_with(k.trim_end_matches('.')))
                || name == "norm"
        );
        if name.starts_with("pil") || name.starts_with("trz") {
            let out = golden.get(&format!("{name}.out"));
            let sides = out.shape[out.shape.len() - 3..].to_vec();
            let want = [&case["height"], &case["width"]].map(|v| v.as_u64().unwrap() as usize);
            assert_eq!(sides[..2], want, "{name}");
        }
    }
}
