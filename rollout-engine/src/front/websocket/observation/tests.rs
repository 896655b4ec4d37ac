//! Observations of the three robots of openpi, and observations that do not fit.

use super::*;

/// Appends a text.
fn text(out: &mut Vec<u8>, text: &str) {
    out.extend([0xd9, text.len() as u8]);
    out.extend(text.bytes());
}

fn bin(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(0xc6);
    out.extend((bytes.len() as u32).to_be_bytes());
    out.extend(bytes);
}

fn array(dtype: &str, shape: &[u16], data: &[u8]) -> Vec<u8> {
    let mut out = vec![0x84];
    bin(&mut out, b"__ndarray__");
    out.push(0xc3);
    bin(&mut out, b"data");
    bin(&mut out, data);
    bin(&mut out, b"dtype");
    text(&mut out, dtype);
    bin(&mut out, b"shape");
    out.push(0x90 | shape.len() as u8);
    for side in shape {
        out.push(0xcd);
        out.extend(side.to_be_bytes());
    }
    out
}

fn map(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut out = vec![0x80 | entries.len() as u8];
    for (key, value) in entries {
        text(&mut out, key);
        out.extend(value);
    }
    out
}

fn prompt(words: &str) -> (&'static str, Vec<u8>) {
    let mut out = Vec::new();
    text(&mut out, words);
    ("prompt", out)
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn state(values: &[f32]) -> Vec<u8> {
    array("<f4", &[values.len() as u16], &floats(values))
}

fn picture() -> Vec<u8> {
    array("|u1", &[2, 1, 3], &[1, 2, 3, 4, 5, 6])
}

fn cameras(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn openpi() -> Vec<String> {
    cameras(&["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"])
}

#[test]
fn the_three_forms_of_openpi_are_read() {
    let libero = map(&[
        ("observation/image", picture()),
        ("observation/wrist_image", picture()),
        ("observation/state", state(&[1.0, 2.0])),
        prompt("pick"),
    ]);
    let seen = read(&libero, &openpi()).expect("LIBERO");
    assert_eq!(
        seen.images.keys().collect::<Vec<_>>(),
        ["base_0_rgb", "left_wrist_0_rgb"],
        "the right wrist is absent"
    );
    assert_eq!((seen.state.as_slice(), seen.prompt.as_str()), (&[1.0, 2.0][..], "pick"));

    let scalar = [
        vec![0x83, 0xc4, 13],
        b"__npgeneric__".to_vec(),
        vec![0xc3, 0xc4, 4],
        b"data".to_vec(),
        vec![0xca, 0x3f, 0, 0, 0, 0xc4, 5],
        b"dtype".to_vec(),
        vec![0xa3],
        b"<f4".to_vec(),
    ]
    .concat();
    let droid = map(&[
        ("observation/exterior_image_1_left", picture()),
        ("observation/wrist_image_left", picture()),
        ("observation/gripper_position", scalar),
        ("observation/joint_position", state(&[3.0, 4.0])),
        prompt("pick"),
    ]);
    let seen = read(&droid, &openpi()).expect("DROID");
    assert_eq!(seen.state, [3.0, 4.0, 0.5], "the gripper is last");

    let planes = || array("|u1", &[3, 2, 1], &[1, 4, 2, 5, 3, 6]);
    let images = map(&[
        ("cam_high", planes()),
        ("cam_left_wrist", planes()),
        ("cam_right_wrist", planes()),
    ]);
    let aloha = map(&[
        ("images", images),
        ("state", array("<f8", &[1], &7f64.to_le_bytes())),
        prompt("pick"),
    ]);
    let seen = read(&aloha, &openpi()).expect("ALOHA");
    assert_eq!(seen.state, [7.0]);
    let image = &seen.images["right_wrist_0_rgb"];
    assert_eq!(
        (image.height(), image.width(), image.data()),
        (2, 1, &[1, 2, 3, 4, 5, 6][..])
    );
}

#[test]
fn a_camera_s_own_name_is_accepted_and_nil_is_absent() {
    for key in ["images/top", "observation/images/top", "observation/top", "top"] {
        let message = map(&[
            (key, picture()),
            ("images/side", vec![0xc0]),
            ("state", vec![0x92, 0x01, 0xca, 0x3f, 0, 0, 0]),
            prompt("pick"),
        ]);
        let seen = read(&message, &cameras(&["side", "top"])).expect("both are named");
        assert_eq!(seen.images.keys().collect::<Vec<_>>(), ["top"]);
        assert_eq!(seen.state, [1.0, 0.5], "a list of numbers");
    }
}

#[test]
fn float_images_become_bytes_as_in_openpi() {
    let values = [0.0, 1.0, 0.5, 0.999, 0.1, 1.0 / 255.0f32];
    let expected: Vec<u8> = values.iter().map(|value| (255.0 * value) as u8).collect();
    let double: Vec<u8> = values
        .iter()
        .flat_map(|value| f64::from(*value).to_le_bytes())
        .collect();
    for image in [
        array("<f4", &[1, 2, 3], &floats(&values)),
        array("<f8", &[1, 2, 3], &double),
    ] {
        let message = map(&[("top", image), ("state", state(&[0.0])), prompt("pick")]);
        let seen = read(&message, &cameras(&["top"])).expect("in range");
        assert_eq!(seen.images["top"].data(), expected);
    }
}

#[test]
fn what_does_not_fit_is_named_in_one_line() {
    let with = |entries: &[(&str, Vec<u8>)]| {
        let error = read(&map(entries), &cameras(&["top"]))
            .expect_err("rejected")
            .to_string();
        assert!(!error.contains('\n'), "{error}");
        error
    };
    let base = |image: Vec<u8>| [("top", image), ("state", state(&[0.0])), prompt("pick")];
    let one = |dtype, value: &[u8]| array(dtype, &[1, 1, 3], &[value, value, value].concat());
    for (error, reason) in [
        (
            with(&[("state", state(&[0.0])), prompt("pick")]),
            "no image of camera `top`",
        ),
        (with(&[("top", picture()), ("state", state(&[0.0]))]), "no prompt"),
        (with(&[("top", picture()), prompt("pick")]), "no state"),
        (
            with(&[
                ("top", picture()),
                ("observation/joint_position", state(&[0.0])),
                prompt("pick"),
            ]),
            "no `observation/gripper_position`",
        ),
        (
            with(&[
                ("top", picture()),
                ("state", state(&[0.0])),
                ("observation/state", state(&[0.0])),
                prompt("pick"),
            ]),
            "the state twice",
        ),
        (
            with(&[
                ("top", picture()),
                ("images/top", picture()),
                ("state", state(&[0.0])),
                prompt("pick"),
            ]),
            "camera `top` twice",
        ),
        (
            with(&[
                ("top", picture()),
                ("wrist", picture()),
                ("state", state(&[0.0])),
                prompt("pick"),
            ]),
            "found `wrist`",
        ),
        (with(&base(array("|u1", &[2, 3], &[0; 6]))), "[2, 3]"),
        (with(&base(array("|u1", &[1, 1, 1, 3], &[0; 3]))), "[1, 1, 1, 3]"),
        (with(&base(one("<i8", &[0; 8]))), "int64"),
        (with(&base(one("<f4", &1.5f32.to_le_bytes()))), "holds 1.5"),
        (with(&base(one("<f8", &f64::NAN.to_le_bytes()))), "holds NaN"),
        (with(&base(one(">f4", &[0; 4]))), "big-endian"),
        (with(&base(array("|u1", &[0, 1, 3], &[]))), "0 x 1 pixels"),
        (
            with(&base(array("|u1", &[9000, 1, 3], &vec![0; 27_000]))),
            "9000 x 1 pixels",
        ),
        (with(&base(vec![0x90])), "`top` is a list"),
        (
            with(&[("top", picture()), ("state", vec![0xc3]), prompt("pick")]),
            "`state` is a boolean",
        ),
        (
            with(&[("top", picture()), ("state", picture()), prompt("pick")]),
            "expected one dimension",
        ),
        (
            with(&[("top", picture()), ("state", state(&[0.0])), ("prompt", vec![0x01])]),
            "`prompt` is an integer",
        ),
        (
            read(&[0x01], &openpi()).expect_err("rejected").to_string(),
            "is an integer",
        ),
        (
            read(&[0x81, 0x01, 0x01], &openpi()).expect_err("rejected").to_string(),
            "a key that is an integer",
        ),
    ] {
        assert!(error.contains(reason), "{error}");
    }
}
