//! Combinations of statistics, widths, cameras, prompts and delta masks: each is refused before a request, or converts numbers in
//! openpi's order of operations.

use super::*;

const ACTION_DIM: usize = 8;
const ENV_ACTION_DIM: usize = 3;
const STATE_DIM: usize = 4;

/// openpi's order of operations, in f64: a state is normalized and padded; a row of actions is unnormalized over the whole width of the
/// model, the state is added where the mask says so, and the row is cut to the robot's width.
mod oracle {
    pub(super) struct Stats {
        pub(super) quantile: bool,
        /// Mean or 1 % quantile, and std or 99 % quantile.
        pub(super) sides: [Vec<f64>; 2],
    }

    pub(super) fn normalize(stats: Option<&Stats>, state: &[f64]) -> Vec<f64> {
        let at = |side: &Vec<f64>, i: usize| side[i];
        let one = |(i, x): (usize, &f64)| match stats {
            None => *x,
            Some(s) if s.quantile => {
                (x - at(&s.sides[0], i)) / (at(&s.sides[1], i) - at(&s.sides[0], i) + 1e-6) * 2.0 - 1.0
            }
            Some(s) => (x - at(&s.sides[0], i)) / (at(&s.sides[1], i) + 1e-6),
        };
        state.iter().enumerate().map(one).collect()
    }

    pub(super) fn command(stats: Option<&Stats>, row: &[f64], mask: &[bool], state: &[f64], width: usize) -> Vec<f64> {
        let one = |(i, x): (usize, &f64)| match stats {
            Some(s) if i < s.sides[0].len() && s.quantile => {
                (x + 1.0) / 2.0 * (s.sides[1][i] - s.sides[0][i] + 1e-6) + s.sides[0][i]
            }
            Some(s) if i < s.sides[0].len() => x * (s.sides[1][i] + 1e-6) + s.sides[0][i],
            Some(s) if !s.quantile => x * (1.0 + 1e-6),
            _ => *x,
        };
        let whole = row.iter().enumerate().map(one);
        let added = whole
            .enumerate()
            .map(|(i, x)| if mask.get(i) == Some(&true) { x + state[i] } else { x });
        added.take(width).collect()
    }
}

/// One choice of a part of the contract; `refusal` is in the text of the error, `None` for a sound part.
struct Choice<T> {
    name: &'static str,
    value: T,
    refusal: Option<&'static str>,
}

fn choice<T>(name: &'static str, value: T, refusal: Option<&'static str>) -> Choice<T> {
    Choice { name, value, refusal }
}

/// Returns statistics of these widths, with zeros behind the used dimensions.
fn stats(state: (usize, usize), actions: (usize, usize), quantiles: bool) -> NormStats {
    let dims = |(used, width): (usize, usize), first: f64| {
        let row = |f: &dyn Fn(f64) -> f64| {
            let numbers = (0..width).map(|i| if i < used { f(first + i as f64) } else { 0.0 });
            numbers.collect::<Vec<f64>>()
        };
        DimStats {
            mean: row(&|i| 0.3 * i - 0.5),
            std: row(&|i| 0.2 + 0.1 * i),
            q01: quantiles.then(|| row(&|i| -0.7 - 0.2 * i)),
            q99: quantiles.then(|| row(&|i| 0.9 + 0.3 * i)),
        }
    };
    NormStats {
        state: dims(state, 1.0),
        actions: dims(actions, 2.0),
    }
}

fn close(found: &[f32], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        // one f32 rounding of each of two operations on numbers of this magnitude
        let error = (f64::from(*found) - expected).abs();
        assert!(
            error <= 3e-7 * expected.abs().max(1.0),
            "{what}: {found}, expected {expected}"
        );
    }
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn every_combination_is_sound_or_refused_before_a_request() {
    use Normalization::{None as Off, Quantile, ZScore};
    let (plain, padded) = ((STATE_DIM, STATE_DIM), (STATE_DIM, ACTION_DIM));
    let own = (ENV_ACTION_DIM, ENV_ACTION_DIM);
    let normalizations = [
        choice("off, no statistics", (Off, None), None),
        choice("z_score", (ZScore, Some(stats(plain, own, false))), None),
        choice("z_score, padded", (ZScore, Some(stats(padded, (3, 8), false))), None),
        choice(
            "z_score, padded half-way",
            (ZScore, Some(stats((4, 6), (3, 5), true))),
            None,
        ),
        choice("quantile", (Quantile, Some(stats(plain, own, true))), None),
        choice("quantile, padded", (Quantile, Some(stats(padded, (3, 8), true))), None),
        choice("z_score without statistics", (ZScore, None), Some("no statistics")),
        choice(
            "no quantiles",
            (Quantile, Some(stats(plain, own, false))),
            Some("no `q01` and `q99`"),
        ),
        choice(
            "narrow actions",
            (ZScore, Some(stats(plain, (2, 2), false))),
            Some("of `actions` have 2 dimensions"),
        ),
        choice(
            "wide actions",
            (ZScore, Some(stats(plain, (3, 9), false))),
            Some("of `actions` have 9 dimensions"),
        ),
        choice(
            "wide state",
            (ZScore, Some(stats((4, 9), own, false))),
            Some("of `state` have 9 dimensions"),
        ),
    ];
    let masks = [
        choice("absolute", None, None),
        choice("[2, -1]", Some(vec![2, -1]), None),
        choice("[-1, 2]", Some(vec![-1, 2]), None),
        choice("[4]", Some(vec![4]), Some("`delta_actions` is [4]")),
        choice("[1, 0]", Some(vec![1, 0]), Some("`delta_actions` is [1, 0]")),
    ];
    let widths = [
        choice("width of the statistics", None, None),
        choice("4 numbers", Some(STATE_DIM), None),
        choice("9 numbers", Some(9), Some("`env_state_dim` is 9")),
    ];
    let cameras = [
        choice("two cameras", vec!["top", "wrist"], None),
        choice("one name twice", vec!["top", "top"], Some("`top` twice")),
    ];
    let words = |bins: bool| {
        let frame = ["pick", "red", "Task", "State", "Action", ":", ",", ";"].map(str::to_owned);
        let bins = (-1..256).filter(|_| bins).map(|n| n.to_string());
        Tokenizer::from_words(&frame.into_iter().chain(bins).collect::<Vec<_>>()).expect("words")
    };
    let prompts = [
        choice("prompt", (false, 4, 300, words(false)), None),
        choice("state in words", (true, 20, 300, words(true)), None),
        choice(
            "state without words",
            (true, 20, 300, words(false)),
            Some("cannot encode the state"),
        ),
        choice(
            "no room for the state",
            (true, 9, 300, words(true)),
            Some("needs at least"),
        ),
        choice("small vocabulary", (false, 4, 11, words(false)), Some("`vocab` is 11")),
    ];
    let (mut sound, mut refused) = (0, 0);
    for normalization in &normalizations {
        for mask in &masks {
            for width in &widths {
                for camera in &cameras {
                    for prompt in &prompts {
                        let names = [normalization.name, mask.name, width.name, camera.name, prompt.name].join(", ");
                        let (discrete_state_input, prompt_len, vocab, tokenizer) = prompt.value.clone();
                        let contract = Contract {
                            cameras: camera.value.iter().map(|name| (*name).to_owned()).collect(),
                            image_size: 2,
                            vocab,
                            prompt_len,
                            action_dim: ACTION_DIM,
                            action_horizon: 2,
                            env_action_dim: ENV_ACTION_DIM,
                            env_state_dim: width.value,
                            discrete_state_input,
                            normalization: normalization.value.0,
                            norm_stats: normalization.value.1.clone(),
                            delta_actions: mask.value.clone(),
                        };
                        let refusals: Vec<&str> = [
                            normalization.refusal,
                            mask.refusal,
                            width.refusal,
                            camera.refusal,
                            prompt.refusal,
                        ]
                        .into_iter()
                        .flatten()
                        .collect();
                        // without any width of the state, the prompt may have no number of the state
                        let any_width = width.value.is_none() && normalization.value.1.is_none();
                        match Transform::new(contract.clone(), tokenizer) {
                            Err(error) => {
                                let error = error.to_string();
                                assert!(
                                    refusals.iter().any(|refusal| error.contains(refusal)),
                                    "{names}: {error}"
                                );
                                refused += 1;
                            }
                            Ok(transform) => {
                                let waits = prompt.name == "no room for the state" && any_width;
                                assert!(
                                    refusals.is_empty() || (waits && refusals.len() == 1),
                                    "{names}: accepted"
                                );
                                if !waits {
                                    numbers(&transform, &contract, &names);
                                    sound += 1;
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(sound >= 60 && refused >= 60, "{sound} sound, {refused} refused");
}

/// Compares states, commands and the way back with the oracle, and checks which requests are refused.
fn numbers(transform: &Transform, contract: &Contract, names: &str) {
    let side = |dims: &DimStats| {
        let quantile = contract.normalization == Normalization::Quantile;
        let (low, high) = if quantile {
            (dims.q01.clone().expect("checked"), dims.q99.clone().expect("checked"))
        } else {
            (dims.mean.clone(), dims.std.clone())
        };
        oracle::Stats {
            quantile,
            sides: [low, high],
        }
    };
    let stats = contract.norm_stats.as_ref();
    let (of_state, of_actions) = (stats.map(|s| side(&s.state)), stats.map(|s| side(&s.actions)));
    let image = RgbImage::new(2, 2, vec![9; 12]).expect("12 bytes");
    let state = [0.1f32, -0.4, 0.9, 0.25];
    let raw = RawObservation {
        images: contract
            .cameras
            .iter()
            .map(|name| (name.clone(), image.clone()))
            .collect(),
        state: state.to_vec(),
        prompt: "pick".to_owned(),
    };
    let wide: Vec<f64> = state.iter().map(|x| f64::from(*x)).collect();
    let input = transform.input(&raw).unwrap_or_else(|error| panic!("{names}: {error}"));
    let mut expected = oracle::normalize(of_state.as_ref(), &wide);
    expected.resize(ACTION_DIM, 0.0);
    close(&input.state, &expected, names);

    let actions: Vec<f32> = (0..2 * ACTION_DIM).map(|i| 0.11 * i as f32 - 0.8).collect();
    let mask = contract.delta_mask().unwrap_or_default();
    let expected: Vec<f64> = actions
        .chunks(ACTION_DIM)
        .flat_map(|row| {
            let row: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
            oracle::command(of_actions.as_ref(), &row, &mask, &wide, ENV_ACTION_DIM)
        })
        .collect();
    let commands = transform.env_actions(&actions, &state).expect("finite");
    close(&commands, &expected, names);
    let back = transform
        .model_actions(&commands, ENV_ACTION_DIM, &state)
        .expect("fits");
    for (index, (back, action)) in back
        .iter()
        .zip(actions.chunks(ACTION_DIM).flat_map(|row| &row[..ENV_ACTION_DIM]))
        .enumerate()
    {
        // f32 rounding of both ways, divided by a spread of at least 0.4
        assert!((back - action).abs() < 3e-6, "{names}: [{index}] {back} {action}");
    }

    let with_state = |state: Vec<f32>| transform.input(&RawObservation { state, ..raw.clone() });
    let widths = contract.state_width();
    for width in 0..=ACTION_DIM + 1 {
        let answer = with_state(vec![0.2; width]);
        if widths.accepts(width) {
            assert!(
                matches!(answer, Ok(_) | Err(ObservationError::PromptLength { .. })),
                "{names}: {width} numbers"
            );
        } else {
            let error = answer.expect_err(names).to_string();
            assert!(
                error.contains(&format!("{width} numbers, expected {widths}")),
                "{names}: {error}"
            );
        }
    }
    let mut partial = raw.clone();
    partial.images.insert("side".to_owned(), image);
    let error = transform.input(&partial).expect_err(names).to_string();
    assert!(
        error.contains("`side`") && error.contains("top, wrist"),
        "{names}: {error}"
    );
    let long = RawObservation {
        prompt: "pick red ".repeat(9),
        ..raw
    };
    match transform.input_with_remarks(&long) {
        Err(ObservationError::PromptLength { found, expected, .. }) => {
            assert!(contract.discrete_state_input && found > expected, "{names}");
        }
        Ok((_, remarks)) => {
            let cut = remarks
                .iter()
                .filter(|remark| matches!(remark, Remark::CutPrompt { found: 20, kept: 4 }));
            assert!(
                !contract.discrete_state_input && cut.count() == 1,
                "{names}: {remarks:?}"
            );
            let told: Vec<Option<String>> = [&long.prompt, &long.prompt, "pick red red red"]
                .map(|prompt| transform.report(&Remark::CutPrompt { found: 20, kept: 4 }, prompt))
                .to_vec();
            assert!(
                told[0].is_some() && told[1].is_none() && told[2].is_some(),
                "{names}: {told:?}"
            );
        }
        Err(error) => panic!("{names}: {error}"),
    }
}

/// The inputs of public bug reports in `tests/data/cases`, with what is right for each.
#[test]
fn inputs_from_bug_reports_have_the_right_outcome() {
    let words = || Tokenizer::from_words(&["pick".to_owned()]).expect("words");
    let contract = |text: &str, normalization, delta_actions: Option<Vec<i32>>, env_action_dim, action_dim| Contract {
        cameras: vec!["top".to_owned()],
        image_size: 2,
        vocab: 5,
        prompt_len: 4,
        action_dim,
        action_horizon: 1,
        env_action_dim,
        env_state_dim: None,
        discrete_state_input: false,
        normalization,
        norm_stats: Some(NormStats::from_json(text).expect("statistics")),
        delta_actions,
    };
    let observation = |state: &[f32]| RawObservation {
        images: BTreeMap::from([("top".to_owned(), RgbImage::new(2, 2, vec![0; 12]).expect("12 bytes"))]),
        state: state.to_vec(),
        prompt: "pick".to_owned(),
    };

    // as wide as the model's action row: accepted, the row is unnormalized and cut
    let padded = include_str!("../../../../tests/data/cases/norm_stats_padded_to_32.json");
    for normalization in [Normalization::ZScore, Normalization::Quantile] {
        for env_action_dim in 1..=32 {
            let transform =
                Transform::new(contract(padded, normalization, None, env_action_dim, 32), words()).expect("accepted");
            let commands = transform.env_actions(&[0.5; 32], &[0.5; 4]).expect("converts");
            assert_eq!(commands.len(), env_action_dim);
            // (0.5 + 1) / 2 * (2 + 1e-6) - 1, and 0.5 * (1 + 1e-6) + 0
            assert!((commands[0] - 0.5).abs() < 1e-6, "{normalization:?}: {commands:?}");
            assert!(
                commands.iter().skip(3).all(|x| x.abs() < 1e-5),
                "a dimension of padding does not move: {commands:?}"
            );
            let input = transform
                .input(&observation(&[0.8, 0.5, 0.5, 0.2]))
                .expect("the robot's width");
            let expected = if normalization == Normalization::ZScore {
                1.0
            } else {
                0.6
            };
            assert!((input.state[0] - expected).abs() < 1e-5, "{:?}", input.state);
            assert!(transform.input(&observation(&[0.8])).is_err(), "one number");
        }
    }
    assert!(
        Transform::new(contract(padded, Normalization::ZScore, None, 3, 16), words()).is_err(),
        "wider than the model"
    );

    // no quantiles: refused where configuration and statistics meet
    let without = include_str!("../../../../tests/data/cases/norm_stats_without_quantiles.json");
    let error =
        Transform::new(contract(without, Normalization::Quantile, None, 3, 8), words()).expect_err("no quantiles");
    assert!(matches!(error, ContractError::NoQuantiles { key: "state" }), "{error}");
    Transform::new(contract(without, Normalization::ZScore, None, 3, 8), words()).expect("accepted");

    // a state of another width never becomes a command
    let delta = include_str!("../../../../tests/data/cases/norm_stats_delta.json");
    let transform =
        Transform::new(contract(delta, Normalization::ZScore, Some(vec![2, -1]), 3, 8), words()).expect("accepted");
    for state in [&[0.1f32][..], &[], &[0.1; 3], &[0.1; 5]] {
        let error = transform
            .input(&observation(state))
            .expect_err("another width")
            .to_string();
        assert!(
            error.contains(&format!("state has {} numbers, expected 4", state.len())),
            "{error}"
        );
    }
    transform
        .input(&observation(&[0.1, 0.9, 0.5, 0.5]))
        .expect("the robot's width");

    // openpi's number stays; the dimension is named once, at the start and at the first request
    let near = include_str!("../../../../tests/data/cases/norm_stats_near_constant_joint.json");
    let transform = Transform::new(contract(near, Normalization::Quantile, None, 3, 8), words()).expect("accepted");
    let warnings = transform.contract().warnings();
    assert!(
        warnings.len() == 1 && warnings[0].contains("`state[2]` is nearly constant"),
        "{warnings:?}"
    );
    let (input, remarks) = transform
        .input_with_remarks(&observation(&[0.5, 0.5, 1.6, 0.5]))
        .expect("served");
    // (1.6 - 1.5686) / (0.001 + 1e-6) * 2 - 1
    assert!((input.state[2] - 61.7).abs() < 0.1, "{:?}", input.state);
    let [remark] = &remarks[..] else { panic!("{remarks:?}") };
    assert!(matches!(remark, Remark::Far { dimension: 2, .. }), "{remark:?}");
    let line = transform.report(remark, "pick").expect("the first time");
    assert!(
        line.contains("state[2] is 1.6") && transform.report(remark, "pick").is_none(),
        "{line}"
    );
}
