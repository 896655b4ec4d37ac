//! Properties of advantages and losses that hold for any input, on random input.

use learner::{
    advantage::{
        Advantages, ESTIMATORS, Episode, EstimatorSettings, EstimatorSpec, LayeredEpisode, estimator, gae_episode,
        normalize,
    },
    batch::minibatch::{ShuffleSeed, permutation},
    collect::filter::keep_members,
    loss::{
        ActorInput, ActorSettings, CriticInput, CriticSettings, POLICY_LOSSES, PolicyInput, PolicyLossFn,
        PolicyLossSpec, PolicySettings, Share, aggregate_logprob, policy_loss,
    },
    ranks::OneRank,
};
use policy::config::LogprobType;
use proptest::{collection::vec, prelude::*};
use tch::{Kind, Tensor};

const LEVELS: [LogprobType; 3] = [
    LogprobType::TokenLevel,
    LogprobType::ActionLevel,
    LogprobType::ChunkLevel,
];
const SETTINGS: EstimatorSettings = EstimatorSettings {
    gamma: 0.97,
    gae_lambda: 0.9,
};

fn close(got: f64, want: f64) -> bool {
    // f32 sums of some tens of numbers of order 1 to 100
    (got - want).abs() <= 1e-4 * want.abs().max(1.0)
}

// ---- advantages

/// Returns a strategy for rewards, values and final value of an episode of chunks of this length; the last chunk may be shorter.
fn episode(chunk_len: usize) -> impl Strategy<Value = (Vec<f32>, Vec<f32>, f32)> {
    vec(-2.0f32..2.0, 1..25).prop_flat_map(move |rewards| {
        let chunks = rewards.len().div_ceil(chunk_len);
        (Just(rewards), vec(-2.0f32..2.0, chunks), -2.0f32..2.0)
    })
}

type Drawn = (Vec<f32>, Vec<f32>, f32);

/// Estimates GAE over chunks of `steps` denoise steps.
fn layered_gae(
    rewards: &[f32],
    values: &[f32],
    steps: usize,
    final_value: f32,
    settings: EstimatorSettings,
) -> Advantages {
    let gae = ESTIMATORS
        .iter()
        .find(|spec| spec.adv_type == "gae")
        .expect("registered");
    let episode = LayeredEpisode {
        rewards,
        values,
        steps,
        final_value,
    };
    let mut estimated = gae.layered.expect("over both layers")(&[episode], settings).expect("a value per step");
    estimated.remove(0)
}

fn episodes<'a>(drawn: &'a [Drawn], groups: &[u64]) -> Vec<Episode<'a>> {
    let one = |((rewards, values, last), group): (&'a Drawn, &u64)| Episode {
        rewards,
        chunk_len: 4,
        values,
        final_value: *last,
        group: *group,
    };
    drawn.iter().zip(groups).map(one).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn gae_at_lambda_one_is_the_discounted_return_less_the_value(
        (chunk_len, (rewards, values, last)) in (1usize..6).prop_flat_map(|len| (Just(len), episode(len))),
        gamma in 0.5f64..1.0,
    ) {
        let advantages = gae_episode(&rewards, chunk_len, &values, last, gamma, 1.0);
        for (at, advantage) in advantages.iter().enumerate() {
            let mut total = f64::from(last) * gamma.powi((rewards.len() - at) as i32);
            for (steps, reward) in rewards[at..].iter().enumerate() {
                total += f64::from(*reward) * gamma.powi(steps as i32);
            }
            let want = total - f64::from(values[at / chunk_len]);
            prop_assert!(close(f64::from(*advantage), want), "step {at}: {advantage} against {want}");
        }
    }

    #[test]
    fn two_layer_gae_at_lambda_one_is_the_discounted_return_less_the_value(
        steps in 1usize..6,
        rewards in vec(-2.0f32..2.0, 1..12),
        values in vec(-2.0f32..2.0, 60),
        last in -2.0f32..2.0,
        gamma in 0.5f64..1.0,
    ) {
        let settings = EstimatorSettings { gamma, gae_lambda: 1.0 };
        let values = &values[..rewards.len() * steps];
        let got = layered_gae(&rewards, values, steps, last, settings);
        prop_assert_eq!((got.advantages.len(), got.returns.len()), (values.len(), values.len()));
        for (at, value) in values.iter().enumerate() {
            // every denoise step of a chunk has the rewards of its execution and of later chunks
            let chunk = at / steps;
            let later = rewards[chunk..].iter().enumerate();
            let paid: f64 = later.map(|(n, reward)| f64::from(*reward) * gamma.powi(n as i32)).sum();
            let want = paid + f64::from(last) * gamma.powi((rewards.len() - chunk) as i32);
            prop_assert!(close(f64::from(got.returns[at]), want), "{at}: {} against {want}", got.returns[at]);
            prop_assert!(close(f64::from(got.advantages[at]), want - f64::from(*value)), "{at}");
        }
    }

    #[test]
    fn permuting_entries_permutes_their_normalised_values(
        entries in vec((-1e3f32..1e3, any::<bool>()), 1..30),
        junk in prop::sample::select(vec![f32::NAN, f32::INFINITY, 1e30]),
        seed in any::<u64>(),
    ) {
        let normalised = |entries: &[(f32, bool)]| {
            let (mut values, mask): (Vec<f32>, Vec<bool>) = entries.iter().copied().unzip();
            normalize(&mut values, Some(&mask), &OneRank).expect("one rank");
            values
        };
        let order = permutation(entries.len(), ShuffleSeed { run: seed, iteration: 0, epoch: 0 });
        let plain = normalised(&entries);
        let moved = normalised(&order.iter().map(|at| entries[*at]).collect::<Vec<_>>());
        for (to, from) in order.iter().enumerate() {
            prop_assert!(close(f64::from(moved[to]), f64::from(plain[*from])), "{} against {}", moved[to], plain[*from]);
        }
        // masked elements do not change the values of the others
        let spoilt: Vec<(f32, bool)> = entries.iter().map(|(v, valid)| (if *valid { *v } else { junk }, *valid)).collect();
        let spoilt = normalised(&spoilt);
        for (at, (_, valid)) in entries.iter().enumerate() {
            prop_assert!(!valid || spoilt[at].to_bits() == plain[at].to_bits());
        }
    }

    #[test]
    fn a_constant_group_has_no_advantage(score in -1e3f32..1e3, members in 2usize..17, parts in 1usize..4) {
        // the same score in another number of chunks: the first chunk has the whole score
        let rewards: Vec<Vec<f32>> = (0..members)
            .map(|member| [vec![score], vec![0.0; member % parts]].concat())
            .collect();
        let group: Vec<Episode<'_>> = rewards
            .iter()
            .map(|rewards| Episode { rewards, chunk_len: 1, values: &[], final_value: 0.0, group: 7 })
            .collect();
        for name in ["grpo", "reinforce_pp_baseline"] {
            let estimated = estimator(name).unwrap()(&group, SETTINGS).unwrap();
            prop_assert!(estimated.iter().flat_map(|a| &a.advantages).all(|a| *a == 0.0), "{name}");
        }
    }

    #[test]
    fn permuting_environments_permutes_advantages_and_filters(
        drawn in vec(episode(4), 6),
        order in Just((0..6).collect::<Vec<usize>>()).prop_shuffle(),
    ) {
        let groups: Vec<u64> = vec![3, 3, 8, 8, 8, 3];
        let pick = |order: &[usize]| -> (Vec<Drawn>, Vec<u64>) {
            order.iter().map(|at| (drawn[*at].clone(), groups[*at])).unzip()
        };
        let (moved, moved_groups) = pick(&order);
        for EstimatorSpec { adv_type: name, estimate, .. } in ESTIMATORS {
            let plain = estimate(&episodes(&drawn, &groups), SETTINGS).unwrap();
            let permuted = estimate(&episodes(&moved, &moved_groups), SETTINGS).unwrap();
            for (to, from) in order.iter().enumerate() {
                let pairs = permuted[to].advantages.iter().zip(&plain[*from].advantages);
                for (got, want) in pairs.chain(permuted[to].returns.iter().zip(&plain[*from].returns)) {
                    // a group's mean is summed in another order
                    prop_assert!(close(f64::from(*got), f64::from(*want)), "{name}: {got} against {want}");
                }
            }
        }
        let score = |(rewards, ..): &Drawn| rewards.iter().sum::<f32>();
        let keep = |drawn: &[Drawn], groups: &[u64]| {
            keep_members(&drawn.iter().map(score).collect::<Vec<_>>(), groups, -1.5, 1.25)
        };
        let (plain, permuted) = (keep(&drawn, &groups), keep(&moved, &moved_groups));
        for (to, from) in order.iter().enumerate() {
            prop_assert_eq!(permuted[to], plain[*from]);
        }
    }
}

// ---- losses

/// Number of rows, each a chunk of 3 actions with 2 dimensions.
const ROWS: usize = 6;
const ACTIONS: usize = 3;
const DIMS: usize = 2;

/// Inputs of one loss.
#[derive(Debug, Clone)]
struct Numbers {
    logprob: Vec<f32>,
    old_logprob: Vec<f32>,
    proximal: Vec<f32>,
    advantage: Vec<f32>,
    value: Vec<f32>,
    old_value: Vec<f32>,
    returns: Vec<f32>,
    mask: Vec<bool>,
    entropy: Vec<f32>,
    /// Length of each row's episode.
    episode_len: Vec<f32>,
}

fn numbers() -> impl Strategy<Value = Numbers> {
    let elements = ROWS * ACTIONS * DIMS;
    let some = |count: usize| vec(-1.0f32..1.0, count);
    (
        (some(elements), some(elements), some(elements), some(ROWS * ACTIONS)),
        (some(ROWS), some(ROWS), some(ROWS)),
        vec(any::<bool>(), ROWS * ACTIONS),
        (some(elements), vec((1u8..9).prop_map(f32::from), ROWS)),
    )
        .prop_map(
            |(
                (logprob, old_logprob, proximal, advantage),
                (value, old_value, returns),
                mask,
                (entropy, episode_len),
            )| Numbers {
                logprob,
                old_logprob,
                proximal,
                advantage,
                value,
                old_value,
                returns,
                mask,
                entropy,
                episode_len,
            },
        )
}

/// Loss and gradients of one set of inputs.
#[derive(Debug, Clone, PartialEq)]
struct Outcome {
    loss: f64,
    logprob_grad: Vec<f32>,
    value_grad: Vec<f32>,
    entropy_grad: Vec<f32>,
}

fn settings() -> PolicySettings {
    PolicySettings {
        actor: ActorSettings {
            clip_ratio_low: 0.2,
            clip_ratio_high: 0.28,
            clip_ratio_c: Some(3.0),
            clip_log_ratio: None,
            episode_steps: None,
            behave_weight_threshold: None,
            kl_beta: Some(0.3),
        },
        critic: CriticSettings {
            value_clip: Some(0.2),
            huber_delta: 0.5,
            episode_steps: None,
        },
        value_coef: 0.5,
        entropy_bonus: None,
    }
}

/// Returns the settings that change which elements count, or their weights.
fn variants() -> [(&'static str, PolicySettings); 5] {
    let with = |change: fn(&mut PolicySettings)| {
        let mut settings = settings();
        change(&mut settings);
        settings
    };
    [
        ("plain", settings()),
        ("dropped", with(|s| s.actor.behave_weight_threshold = Some(1.5))),
        ("entropy", with(|s| s.entropy_bonus = Some(0.1))),
        ("clamped", with(|s| s.actor.clip_log_ratio = Some((-0.3, 0.4)))),
        (
            "by episode",
            with(|s| (s.actor.episode_steps, s.critic.episode_steps) = (Some(4.0), Some(3.0))),
        ),
    ]
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    if !tensor.defined() {
        return Vec::new();
    }
    Vec::try_from(tensor.detach().reshape([-1])).expect("floats")
}

/// Returns loss and gradients of these rows. The mask is per action, or per row for one ratio per chunk; the critic counts rows with any
/// valid action.
fn evaluate(
    numbers: &Numbers,
    loss: PolicyLossFn,
    level: LogprobType,
    settings: &PolicySettings,
    share: Option<Share>,
) -> Outcome {
    let rows = numbers.value.len() as i64;
    let element = |data: &[f32]| Tensor::from_slice(data).view([rows, ACTIONS as i64, DIMS as i64]);
    let leaf = element(&numbers.logprob).set_requires_grad(true);
    let logprob = aggregate_logprob(&leaf, level).expect("elements");
    let old_logprob = aggregate_logprob(&element(&numbers.old_logprob), level).expect("elements");
    let proximal = aggregate_logprob(&element(&numbers.proximal), level).expect("elements");
    let actions = |tensor: Tensor| tensor.view([rows, ACTIONS as i64]);
    let (mut advantage, mut mask) = (
        actions(Tensor::from_slice(&numbers.advantage)),
        actions(Tensor::from_slice(&numbers.mask)),
    );
    let row_mask = mask.any_dim(1, false);
    if level == LogprobType::ChunkLevel {
        advantage = advantage.select(1, 0);
        mask = row_mask.shallow_clone();
    }
    let value = Tensor::from_slice(&numbers.value).set_requires_grad(true);
    let (old_value, returns) = (
        Tensor::from_slice(&numbers.old_value),
        Tensor::from_slice(&numbers.returns),
    );
    let entropy = element(&numbers.entropy).set_requires_grad(true);
    let episode_len = Tensor::from_slice(&numbers.episode_len);
    let input = PolicyInput {
        actor: Some(ActorInput {
            new_logprob: &logprob,
            old_logprob: &old_logprob,
            proximal_logprob: Some(&proximal),
            reference_logprob: None,
            advantages: &advantage,
            mask: Some(&mask),
            episode_len: Some(&episode_len),
        }),
        critic: Some(CriticInput {
            value: &value,
            old_value: &old_value,
            returns: &returns,
            mask: Some(&row_mask),
            episode_len: Some(&episode_len),
        }),
        entropy: (settings.entropy_bonus.is_some()).then_some(&entropy),
        share: share.unwrap_or_default(),
    };
    let out = loss(&input, settings).expect("loss");
    out.loss.backward();
    Outcome {
        loss: out.loss.double_value(&[]),
        logprob_grad: floats(&leaf.grad()),
        value_grad: floats(&value.grad()),
        entropy_grad: floats(&entropy.grad()),
    }
}

fn rows_of(numbers: &Numbers, order: &[usize]) -> Numbers {
    fn pick<T: Copy>(data: &[T], order: &[usize], width: usize) -> Vec<T> {
        order
            .iter()
            .flat_map(|row| data[row * width..(row + 1) * width].to_vec())
            .collect()
    }
    Numbers {
        logprob: pick(&numbers.logprob, order, ACTIONS * DIMS),
        old_logprob: pick(&numbers.old_logprob, order, ACTIONS * DIMS),
        proximal: pick(&numbers.proximal, order, ACTIONS * DIMS),
        advantage: pick(&numbers.advantage, order, ACTIONS),
        value: pick(&numbers.value, order, 1),
        old_value: pick(&numbers.old_value, order, 1),
        returns: pick(&numbers.returns, order, 1),
        mask: pick(&numbers.mask, order, ACTIONS),
        entropy: pick(&numbers.entropy, order, ACTIONS * DIMS),
        episode_len: pick(&numbers.episode_len, order, 1),
    }
}

fn all_close(got: &[f32], want: &[f32]) -> bool {
    got.len() == want.len() && got.iter().zip(want).all(|(g, w)| close(f64::from(*g), f64::from(*w)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_masked_entry_changes_neither_loss_nor_gradient(numbers in numbers(), junk in prop::sample::select(vec![
        f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -200.0,
    ])) {
        for PolicyLossSpec { loss_type: name, loss, .. } in POLICY_LOSSES.iter().copied() {
            for level in LEVELS {
                // at the chunk level a row counts as a whole
                let left_out = |at: usize| match level {
                    LogprobType::ChunkLevel => {
                        let row = at / ACTIONS * ACTIONS;
                        !numbers.mask[row..row + ACTIONS].contains(&true)
                    }
                    _ => !numbers.mask[at],
                };
                let mut spoilt = numbers.clone();
                for at in (0..ROWS * ACTIONS).filter(|at| left_out(*at)) {
                    spoilt.advantage[at] = junk;
                    for element in at * DIMS..(at + 1) * DIMS {
                        spoilt.logprob[element] = junk;
                        spoilt.old_logprob[element] = -junk;
                        spoilt.proximal[element] = junk;
                        spoilt.entropy[element] = junk;
                    }
                }
                for row in (0..ROWS).filter(|row| !numbers.mask[row * ACTIONS..(row + 1) * ACTIONS].contains(&true)) {
                    (spoilt.value[row], spoilt.old_value[row], spoilt.returns[row]) = (junk, -junk, junk);
                }
                for (what, settings) in variants() {
                    let clean = evaluate(&numbers, loss, level, &settings, None);
                    let got = evaluate(&spoilt, loss, level, &settings, None);
                    prop_assert_eq!(&got, &clean, "{} {:?} {}, {}", name, level, junk, what);
                    prop_assert!(clean.loss.is_finite());
                }
            }
        }
    }

    #[test]
    fn the_ratio_is_one_at_equal_log_probabilities(numbers in numbers()) {
        let equal = Numbers {
            old_logprob: numbers.logprob.clone(),
            proximal: numbers.logprob.clone(),
            ..numbers
        };
        for PolicyLossSpec { loss_type: name, loss, .. } in POLICY_LOSSES.iter().copied() {
            for level in LEVELS {
                let rows = ROWS as i64;
                let element = Tensor::from_slice(&equal.logprob).view([rows, ACTIONS as i64, DIMS as i64]);
                let logprob = aggregate_logprob(&element, level).unwrap();
                let advantage = logprob.ones_like();
                let value = Tensor::from_slice(&equal.value);
                let input = PolicyInput {
                    actor: Some(ActorInput {
                        new_logprob: &logprob,
                        old_logprob: &logprob,
                        proximal_logprob: Some(&logprob),
                        reference_logprob: None,
                        advantages: &advantage,
                        mask: None,
                        episode_len: None,
                    }),
                    critic: Some(CriticInput {
                        value: &value,
                        old_value: &value,
                        returns: &value,
                        mask: None,
                        episode_len: None,
                    }),
                    entropy: None,
                    share: Share::default(),
                };
                let metrics = loss(&input, &settings()).unwrap().actor.unwrap();
                let zeros = [
                    metrics.ratio - 1.0,
                    metrics.ratio_deviation_max,
                    metrics.policy_loss + 1.0,
                    metrics.approx_kl,
                    metrics.clip_fraction,
                    metrics.kl_penalty,
                    metrics.behaviour_clip_fraction,
                ];
                prop_assert!(zeros.iter().all(|zero| zero.abs() < f64::EPSILON), "{name} {level:?}: {zeros:?}");
            }
        }
    }

    #[test]
    fn permuting_rows_permutes_gradients(
        numbers in numbers(),
        order in Just((0..ROWS).collect::<Vec<usize>>()).prop_shuffle(),
    ) {
        let back = |grad: &[f32], width: usize| -> Vec<f32> {
            order.iter().flat_map(|row| grad.get(row * width..(row + 1) * width).unwrap_or_default().to_vec()).collect()
        };
        for PolicyLossSpec { loss_type: name, loss, .. } in POLICY_LOSSES.iter().copied() {
            for level in LEVELS {
                for (what, settings) in variants() {
                    let plain = evaluate(&numbers, loss, level, &settings, None);
                    let moved = evaluate(&rows_of(&numbers, &order), loss, level, &settings, None);
                    prop_assert!(close(moved.loss, plain.loss), "{name} {level:?} {what}");
                    for (moved, plain, width) in [
                        (&moved.logprob_grad, &plain.logprob_grad, ACTIONS * DIMS),
                        (&moved.entropy_grad, &plain.entropy_grad, ACTIONS * DIMS),
                        (&moved.value_grad, &plain.value_grad, 1),
                    ] {
                        prop_assert!(all_close(moved, &back(plain, width)), "{name} {level:?} {what}");
                    }
                }
            }
        }
    }

    #[test]
    fn parts_of_a_minibatch_add_up_to_its_gradient(mut numbers in numbers(), cut in 1usize..ROWS) {
        // the critic counts rows, so every row has a valid action
        for row in 0..ROWS {
            numbers.mask[row * ACTIONS] = true;
        }
        let loss = policy_loss("actor_critic").unwrap();
        for level in LEVELS {
            let whole = evaluate(&numbers, loss, level, &settings(), None);
            let valid = |rows: &[usize]| match level {
                LogprobType::ChunkLevel => rows.len() as f64,
                _ => rows.iter().flat_map(|row| &numbers.mask[row * ACTIONS..(row + 1) * ACTIONS]).filter(|m| **m).count() as f64,
            };
            let rows: Vec<usize> = (0..ROWS).collect();
            let (mut logprob_grad, mut value_grad, mut total) = (Vec::new(), Vec::new(), 0.0);
            for part in [&rows[..cut], &rows[cut..]] {
                let weight = part.len() as f64 / ROWS as f64;
                let share = valid(part) / valid(&rows) / weight;
                let share = Share { surrogate: share, entropy: share };
                let one = evaluate(&rows_of(&numbers, part), loss, level, &settings(), Some(share));
                total += one.loss * weight;
                logprob_grad.extend(one.logprob_grad.iter().map(|g| g * weight as f32));
                value_grad.extend(one.value_grad.iter().map(|g| g * weight as f32));
            }
            prop_assert!(close(total, whole.loss), "{level:?}: {total} against {}", whole.loss);
            prop_assert!(all_close(&logprob_grad, &whole.logprob_grad), "{level:?}");
            prop_assert!(all_close(&value_grad, &whole.value_grad), "{level:?}");
        }
    }

    #[test]
    fn weighing_by_episode_length_gives_every_episode_the_same_weight(
        logprob in vec(-0.1f32..0.1, 9),
        advantage in vec(-1.0f32..1.0, 3),
    ) {
        // three episodes of 1, 3 and 5 records; the loss must be the mean of the episodes' means
        let lengths = [1usize, 3, 5];
        let of: Vec<usize> = lengths.iter().enumerate().flat_map(|(episode, len)| vec![episode; *len]).collect();
        let per_record = |values: &[f32]| Tensor::from_slice(&of.iter().map(|e| values[*e]).collect::<Vec<f32>>());
        let new = Tensor::from_slice(&logprob);
        let old = new.zeros_like();
        let mask = new.ones_like().to_kind(Kind::Bool);
        let (len, advantages) = (per_record(&[1.0, 3.0, 5.0]), per_record(&advantage));
        let mut settings = settings();
        settings.actor.episode_steps = Some(3.0);
        settings.actor.kl_beta = None;
        let input = PolicyInput {
            actor: Some(ActorInput {
                new_logprob: &new,
                old_logprob: &old,
                proximal_logprob: None,
                reference_logprob: None,
                advantages: &advantages,
                mask: Some(&mask),
                episode_len: Some(&len),
            }),
            ..PolicyInput::default()
        };
        let loss = policy_loss("actor").unwrap()(&input, &settings).unwrap().loss.double_value(&[]);
        let mut want = 0.0;
        for (at, episode) in of.iter().enumerate() {
            want -= f64::from(logprob[at]).exp() * f64::from(advantage[*episode]) / lengths[*episode] as f64 / 3.0;
        }
        prop_assert!(close(loss, want), "{loss} against {want}");
    }
}
