//! The optimizer and its schedules.

use std::collections::BTreeMap;

use learner::optim::{AdamW, AdamWSettings, Decay, ParamGroup, Schedule};
use tch::{Kind, Tensor};

use super::{Case, Coverage, floats, run, tensor};

fn check_adamw(case: &Case<'_>) {
    let parameter = |name: &str| {
        (
            name.to_owned(),
            tensor(&case.array(&format!("in.p0.{name}"))).set_requires_grad(true),
        )
    };
    let names: Vec<String> = case
        .golden
        .names()
        .iter()
        .filter_map(|name| name.strip_prefix(&format!("{}.in.p0.", case.id)).map(str::to_owned))
        .collect();
    let params: Vec<(String, Tensor)> = names.iter().map(|name| parameter(name)).collect();
    let group = |name: &str, lr: f64, head: bool| ParamGroup {
        name: name.to_owned(),
        lr,
        weight_decay: case.need("weight_decay"),
        params: params
            .iter()
            .filter(|(param, _)| param.contains("value_head") == head)
            .map(|(param, tensor)| (param.clone(), tensor.shallow_clone()))
            .collect(),
    };
    let beta = |at: usize| case.arg("betas")[at].as_f64().expect("beta");
    let settings = AdamWSettings {
        beta1: beta(0),
        beta2: beta(1),
        eps: case.need("eps"),
        clip_norm: Some(case.need("clip")),
    };
    let groups = vec![
        group("actor", case.need("lr"), false),
        group("value_head", case.need("value_lr"), true),
    ];
    let mut optimizer = AdamW::new(settings, groups).unwrap();
    let steps = case.need("steps") as usize;
    let states = |name: &str| {
        (1..=steps)
            .map(|step| case.array(&format!("out.p{step}.{name}")).data)
            .collect::<Vec<_>>()
    };
    // if a recording shows one state at every step, its tensors are views of the last state, and only the last state is compared
    let recorded_each = names
        .iter()
        .any(|name| states(name).windows(2).any(|pair| pair[0] != pair[1]));
    let mut oracle = AdamWOracle::default();
    for step in 0..steps {
        optimizer.zero_grad();
        let gradients: BTreeMap<String, Vec<f64>> = names
            .iter()
            .map(|name| (name.clone(), case.array(&format!("in.grad{step}.{name}")).data))
            .collect();
        for (name, param) in &params {
            // the gradient of sum(param * given) is the given one
            (param * tensor(&case.array(&format!("in.grad{step}.{name}"))))
                .sum(Kind::Float)
                .backward();
        }
        let report = optimizer.step(1.0).unwrap();
        assert!(!report.skipped);
        case.close("norm", report.grad_norm, case.scalar(&format!("out.gradnorm{step}")));
        let norm = gradients.values().flatten().map(|g| g * g).sum::<f64>().sqrt();
        let scale = (case.need("clip") / (norm + 1e-6)).min(1.0);
        for (name, param) in &params {
            let lr = case.need(if name.contains("value_head") { "value_lr" } else { "lr" });
            let initial = || case.array(&format!("in.p0.{name}")).data;
            let expected = oracle.step(
                name,
                initial,
                &gradients[name],
                scale,
                lr,
                &settings,
                case.need("weight_decay"),
            );
            let got = floats(param);
            for (got, want) in got.iter().zip(expected) {
                case.close(&format!("plain loop, step {step}, {name}"), f64::from(*got), *want);
            }
            if recorded_each || step + 1 == steps {
                case.close_array(&format!("out.p{}.{name}", step + 1), &got);
            }
        }
    }
}

/// State of a plain f64 loop of `AdamW`, by parameter name.
#[derive(Default)]
struct AdamWOracle(BTreeMap<String, OracleState>);

/// Parameter, first and second moment, steps taken.
struct OracleState {
    param: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
    steps: i32,
}

impl AdamWOracle {
    fn step(
        &mut self,
        name: &str,
        initial: impl Fn() -> Vec<f64>,
        gradient: &[f64],
        scale: f64,
        lr: f64,
        settings: &AdamWSettings,
        weight_decay: f64,
    ) -> &[f64] {
        let state = self.0.entry(name.to_owned()).or_insert_with(|| OracleState {
            param: initial(),
            m: vec![0.0; gradient.len()],
            v: vec![0.0; gradient.len()],
            steps: 0,
        });
        let OracleState { param, m, v, steps } = state;
        *steps += 1;
        for at in 0..gradient.len() {
            let g = gradient[at] * scale;
            m[at] = settings.beta1 * m[at] + (1.0 - settings.beta1) * g;
            v[at] = settings.beta2 * v[at] + (1.0 - settings.beta2) * g * g;
            let m_hat = m[at] / (1.0 - settings.beta1.powi(*steps));
            let v_hat = v[at] / (1.0 - settings.beta2.powi(*steps));
            param[at] -= lr * weight_decay * param[at] + lr * m_hat / (v_hat.sqrt() + settings.eps);
        }
        param
    }
}

fn check_schedule(case: &Case<'_>, coverage: &mut Coverage) {
    let base_lr = case.need("base_lr");
    let total_steps = case.need("num_training_steps") as u64;
    let warmup_steps = case.need("num_warmup_steps") as u64;
    let recorded = case.array("out.lr").data;
    // f64 on both sides: only the order of the operations differs
    let check = |schedule: Schedule, until: usize| {
        for (step, lr) in recorded.iter().take(until).enumerate() {
            let ours = base_lr * schedule.factor(step as u64);
            assert!(
                (ours - lr).abs() <= 1e-12 * base_lr,
                "{} step {step}: {ours} against {lr}",
                case.id
            );
        }
    };
    let cosine = |min_lr: f64| Decay::Cosine {
        total_steps,
        min_factor: min_lr / base_lr,
    };
    match case.text("lr_scheduler") {
        "constant" => {
            check(
                Schedule {
                    warmup_steps,
                    warmup_start: 0.0,
                    decay: Decay::Constant,
                },
                recorded.len(),
            );
        }
        "openpi_cosine" => check(
            Schedule::warmup(warmup_steps, cosine(case.need("min_lr"))),
            recorded.len(),
        ),
        "cosine" => {
            // the reference's floor is a factor of the optimizer's default rate 1e-3, not of the group's; after the
            // last step its cosine climbs again
            let floor = case.need("min_lr") * base_lr / 1e-3;
            let schedule = |min_lr| Schedule {
                warmup_steps,
                warmup_start: 0.0,
                decay: cosine(min_lr),
            };
            check(schedule(floor), total_steps as usize + 1);
            let last = base_lr * schedule(case.need("min_lr")).factor(total_steps + 3);
            assert!((last - case.need("min_lr")).abs() <= 1e-12 * base_lr);
            let climbed = recorded[total_steps as usize + 3];
            coverage.differs(case, &format!("floor {floor:.1e} instead of the configured {last:.1e}, and {climbed:.1e} three steps after the end, where ours stays at the floor"));
        }
        other => panic!("unknown schedule {other}"),
    }
}

#[test]
fn the_optimizer_and_its_schedules_agree_with_the_reference() {
    run("rlinf_optim", &[], |case, coverage| {
        if case.number("steps").is_some() {
            check_adamw(case);
        } else {
            check_schedule(case, coverage);
        }
    });
}
