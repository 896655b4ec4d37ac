//! Each method against its formula written out in plain numbers.

use tch::{Kind, Tensor};

use super::*;

/// One sample of two rows with two elements, the second row not executed.
struct Case {
    velocity: [f64; 4],
    reference: [f64; 4],
    target: [f64; 4],
    credit: f64,
}

const CASE: Case = Case {
    velocity: [0.3, -0.2, 5.0, 5.0],
    reference: [0.1, 0.4, -7.0, 2.0],
    target: [-0.5, 0.9, 1.0, 1.0],
    credit: 0.7,
};

fn tensor(values: &[f64; 4]) -> Tensor {
    Tensor::from_slice(values).to_kind(Kind::Float).view([1, 2, 2])
}

/// Loss and gradient with respect to the velocity.
fn evaluate(method: &dyn VelocityLoss, case: &Case) -> (f64, Vec<f32>) {
    let velocity = tensor(&case.velocity).set_requires_grad(true);
    let loss = method.loss(&Velocities {
        velocity: &velocity,
        reference: &tensor(&case.reference),
        target: &tensor(&case.target),
        executed: &tensor(&[1.0, 1.0, 0.0, 0.0]).to_kind(tch::Kind::Bool),
        credit: &Tensor::from_slice(&[case.credit as f32]),
    });
    assert_eq!(loss.size(), [1]);
    let loss = loss.sum(Kind::Float);
    loss.backward();
    let gradient = velocity.grad().contiguous().view([-1]);
    (loss.double_value(&[]), Vec::try_from(gradient).expect("gradient"))
}

fn method(name: &str, params: &str) -> Box<dyn VelocityLoss> {
    let build = velocity_loss(name).expect("registered");
    build(&params.parse().expect("TOML")).expect("parameters")
}

const FLOW_IPO: &str = "alpha = 2.0\nt_min = 0.2\nt_max = 0.8\ncredit = \"displacement\"";
const NFT: &str = "beta = 0.5\nadvantage_max = 2.0\nt_min = 0.1\nt_max = 0.9\nform = \"mse\"";

/// f32 keeps seven digits, the numbers are near 1.
fn close(got: f64, want: f64) -> bool {
    (got - want).abs() < 1e-6
}

fn mean_square(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / a.len() as f64
}

#[test]
fn flow_ipo_is_the_distance_to_the_interpolated_target_over_executed_elements() {
    let (loss, gradient) = evaluate(&*method("flow_ipo", FLOW_IPO), &CASE);
    let target: Vec<f64> = (0..2)
        .map(|i| CASE.credit * CASE.target[i] + (1.0 - CASE.credit) * CASE.reference[i])
        .collect();
    assert!(close(loss, mean_square(&CASE.velocity[..2], &target)), "{loss}");
    for i in 0..2 {
        assert!(
            close(f64::from(gradient[i]), CASE.velocity[i] - target[i]),
            "{gradient:?}"
        );
    }
    assert_eq!(gradient[2..], [0.0, 0.0], "what was not executed teaches nothing");
}

#[test]
fn without_credit_flow_ipo_keeps_the_reference() {
    let kept = Case {
        velocity: CASE.reference,
        credit: 0.0,
        ..CASE
    };
    let (loss, gradient) = evaluate(&*method("flow_ipo", FLOW_IPO), &kept);
    assert!(loss.abs() < f64::EPSILON && gradient.iter().all(|g| g.abs() < f32::EPSILON));
}

#[test]
fn displacement_is_compared_within_its_episode_and_directed_by_success() {
    let method = method("flow_ipo", FLOW_IPO);
    // two episodes with the same distances, one successful, and one of a single chunk; their chunks are interleaved
    let credit = method.credit(&Episodes {
        episode: &[0, 1, 0, 1, 2],
        success: &[true, false, true, false, true],
        advantages: &[0.0; 5],
        displacement: &[1.0, 1.0, 3.0, 3.0, 9.0],
    });
    // z of (1, 3) with the unbiased deviation sqrt(2): -+1/sqrt(2)
    let z = 1.0 / 2f64.sqrt();
    let weight = |credit: f64| 1.0 / (1.0 + (-2.0 * credit).exp());
    for (got, want) in credit.iter().zip([weight(-z), weight(z), weight(z), weight(-z), 0.5]) {
        assert!(close(f64::from(*got), want), "{credit:?}");
    }
}

#[test]
fn an_episode_that_never_left_the_reference_has_even_weights() {
    let credit = method("flow_ipo", FLOW_IPO).credit(&Episodes {
        episode: &[0, 0],
        success: &[true, true],
        advantages: &[0.0; 2],
        displacement: &[0.0; 2],
    });
    assert_eq!(credit, [0.5, 0.5]);
}

#[test]
fn nft_is_the_sum_over_both_branches() {
    let method = method("nft", NFT);
    let (loss, gradient) = evaluate(&*method, &CASE);
    let branch = |sign: f64| -> Vec<f64> {
        (0..2)
            .map(|i| CASE.reference[i] + sign * 0.5 * (CASE.velocity[i] - CASE.reference[i]))
            .collect()
    };
    let (toward, away) = (branch(1.0), branch(-1.0));
    let energies = (
        mean_square(&toward, &CASE.target[..2]),
        mean_square(&away, &CASE.target[..2]),
    );
    let want = 0.5 * ((1.0 + CASE.credit) * energies.0 + (1.0 - CASE.credit) * energies.1);
    assert!(close(loss, want), "{loss} against {want}");
    for i in 0..2 {
        let slope = 0.5
            * 0.5
            * ((1.0 + CASE.credit) * (toward[i] - CASE.target[i]) - (1.0 - CASE.credit) * (away[i] - CASE.target[i]));
        assert!(close(f64::from(gradient[i]), slope), "{gradient:?}");
    }
    assert_eq!(gradient[2..], [0.0, 0.0]);

    let softplus = self::method("nft", &NFT.replace("mse", "softplus"));
    let (loss, _) = evaluate(&*softplus, &CASE);
    assert!(
        close(loss, (CASE.credit * (energies.0 - energies.1)).exp().ln_1p()),
        "{loss}"
    );
}

#[test]
fn at_the_reference_nft_follows_the_sign_of_the_advantage() {
    for form in ["mse", "softplus"] {
        let method = method("nft", &NFT.replace("mse", form));
        let at = |credit: f64| {
            let case = Case {
                velocity: CASE.reference,
                credit,
                ..CASE
            };
            evaluate(&*method, &case).1
        };
        let (good, bad, even) = (at(1.0), at(-1.0), at(0.0));
        for i in 0..2 {
            let toward = (CASE.target[i] - CASE.reference[i]) as f32;
            assert!(
                good[i] * toward < 0.0,
                "{form}: down the gradient is towards the recorded chunk"
            );
            assert!(
                (good[i] + bad[i]).abs() < 1e-6,
                "{form}: a bad chunk pushes as far away"
            );
            assert!(even[i].abs() < 1e-6, "{form}: an even one not at all");
        }
    }
}

#[test]
fn credit_of_nft_is_the_cut_advantage() {
    let credit = method("nft", NFT).credit(&Episodes {
        episode: &[0, 0, 0],
        success: &[true; 3],
        advantages: &[1.0, -9.0, 0.0],
        displacement: &[],
    });
    assert_eq!(credit, [0.5, -1.0, 0.0]);
}

#[test]
fn wrong_parameters_are_refused_by_name() {
    for (name, params, wanted) in [
        ("flow_ipo", FLOW_IPO.replace("alpha", "alpa"), "alpa"),
        ("flow_ipo", FLOW_IPO.replace("2.0", "-2.0"), "`alpha` = -2"),
        ("flow_ipo", FLOW_IPO.replace("0.8", "0.1"), "t_min < t_max"),
        ("nft", NFT.replace("mse", "square"), "square"),
        ("nft", NFT.replace("beta = 0.5", "beta = 0"), "beta"),
    ] {
        let error = velocity_loss(name).expect("registered")(&params.parse().expect("TOML")).expect_err("refused");
        assert!(error.to_string().contains(wanted), "{error}");
    }
    assert!(velocity_loss("actor").is_none());
}
