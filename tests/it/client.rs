//! A client outside the ring: chunks that continue the previous chunk, and pi0.5's prompt with the state.

use integration_tests::ring::{Client, Worker, row};
use learner::{
    batch::RolloutBatch, collect::sampling::sample, ranks::OneRank, ring::launch::Children, update::Updater,
};
use policy::prompt::Tokenizer;
use wire::{
    array::Array,
    messages::{ActRequest, ActRow, FromEngine, Guidance, Mode, ToEngine},
};

use crate::ring::{Ring, block_on, record};

/// A robot that executes one chunk while it waits for the next chunk moves without a jump.
#[test]
fn a_guided_chunk_goes_on_from_the_one_before() {
    let Ring {
        plan,
        engine,
        hub: _hub,
        dir: _dir,
        ..
    } = Ring::start(&[], 4);
    block_on(async {
        let mut client = Client::connect(&engine.listen).await;
        let plain = |number| ActRow {
            record: false,
            ..row(&plan, number, Mode::Eval)
        };
        let guided = |number, previous: &Array| ActRow {
            guidance: Some(Guidance {
                previous: previous.clone(),
                delay: 2,
                max_weight: 1.0,
            }),
            ..plain(number)
        };
        let before = client.act(1, vec![plain(0)]).await.rows.remove(0).actions;
        let chunk = before.to_f32("actions", None).expect("actions");
        let width = plan.config.actor.model.env_action_dim;
        // one row has been executed when the next observation is made
        let rest = Array::f32(&[chunk.len() / width - 1, width], &chunk[width..]);
        let mut reply = client.act(2, vec![plain(1), guided(1, &rest)]).await;
        let [free, held] = [0, 0].map(|_| reply.rows.remove(0).actions.to_f32("actions", None).expect("actions"));
        let gap = |actions: &[f32], rows: std::ops::Range<usize>| {
            let range = rows.start * width..rows.end * width;
            let pairs = actions[range.clone()]
                .iter()
                .zip(&chunk[range.start + width..range.end + width]);
            pairs.map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max)
        };
        // the weight is 1 until half of the flow time remains; at least 1/3 of the last two steps' change is corrected
        let (without, with) = (gap(&free, 0..2), gap(&held, 0..2));
        println!("largest gap to the chunk before: {without:.3} without, {with:.3} with guidance");
        assert!(with < 0.7 * without, "{with} against {without}");

        let wrong = |guidance: Guidance, record| ActRow {
            record,
            guidance: Some(guidance),
            ..plain(1)
        };
        let good = Guidance {
            previous: rest.clone(),
            delay: 2,
            max_weight: 5.0,
        };
        let wide = Array::f32(&[1, width + 1], &vec![0.0; width + 1]);
        for (request, row, reason) in [
            (3, wrong(good.clone(), true), "without a record"),
            (
                4,
                wrong(
                    Guidance {
                        previous: wide,
                        ..good.clone()
                    },
                    false,
                ),
                "guidance.previous",
            ),
            (
                5,
                wrong(
                    Guidance {
                        max_weight: 0.0,
                        ..good.clone()
                    },
                    false,
                ),
                "max_weight",
            ),
        ] {
            client
                .send(&ToEngine::Act(ActRequest {
                    request,
                    rows: vec![row],
                }))
                .await;
            match client.receive().await {
                FromEngine::Refused(refusal) => assert!(refusal.reason.contains(reason), "{}", refusal.reason),
                other => panic!("expected a refusal, got {other:?}"),
            }
        }
    });
}

/// Returns pi0.5's words as TOML: words of the tabletop and of its prompt, and the bins of the state.
fn words_with_state() -> String {
    let bins = (-1..256).map(|bin| bin.to_string());
    let words = ["pick", "red", "green", "blue", "Task", ":", ",", "State", ";", "Action"].map(str::to_owned);
    let all: Vec<String> = words.into_iter().chain(bins).map(|word| format!("{word:?}")).collect();
    format!("actor.model.tokenizer={{kind=\"words\",words=[{}]}}", all.join(","))
}

/// For pi0.5 the engine records the prompt with the state in words, and the learner reads the same prompt: the ratio is 1.
#[test]
fn the_prompt_of_pi05_holds_the_state() {
    let words = words_with_state();
    let overrides = [
        "actor.model.variant=\"pi05\"",
        "actor.model.discrete_state_input=true",
        "actor.model.prompt_len=20",
        "actor.model.vocab=300",
        "actor.model.value_head.state=false",
        "actor.optim.critic_warmup_epochs=0",
        "env.train.total_num_envs=8",
        &words,
    ];
    let ring = Ring::start(&overrides, 4);
    let model = &ring.plan.config.actor.model;
    let tokenizer = Tokenizer::from_config(&model.tokenizer, None).expect("words");
    block_on(async {
        let mut client = Client::connect(&ring.engine.listen).await;
        for number in [0, 5] {
            let asked = row(&ring.plan, number, Mode::Train);
            let seen = &asked.observation;
            let want = tokenizer
                .tokenize_with_state(&seen.prompt, &seen.state, model.prompt_len)
                .expect("prompt");
            let reply = client.act(number, vec![asked.clone()]).await;
            assert_eq!(record(&reply, 0).prompt, want.ids);
            assert_eq!(record(&reply, 0).prompt_mask, want.mask);
        }
    });
    let worker = Worker::start(&ring.engine.listen, 8);
    let got = sample(&ring.hub, &mut Children::default(), &ring.plan, 0, 0).expect("episodes");
    let batch = RolloutBatch::new(&ring.plan, got.trajectories, 0, &OneRank).expect("records");
    let report = Updater::new(&ring.plan, &ring.policy, &OneRank)
        .and_then(|mut updater| updater.update(&batch, 0))
        .expect("update");
    // two programs sum in another order
    assert!(report.first_ratio_deviation < 1e-3, "{}", report.first_ratio_deviation);
    drop(worker);
}
