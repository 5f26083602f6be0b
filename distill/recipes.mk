# Long trainings, stage by stage. A stage that is done has left .done in its folder; one that was stopped goes on from
# its checkpoint. What it prints is also in log.txt there. With -j 2 stages that do not wait for each other run together.

CONFIGS ?= distill/configs
OUT ?= out/sprites

# $(call stage,folder,stage,config,folders that it reads)
define stage
$(1)/.done: SHELL := /bin/bash
$(1)/.done: $(addsuffix /.done,$(4)) | setup
	@mkdir -p $(1)
	set -o pipefail; $(BIN)/python -m distill $(2) --config $(CONFIGS)/$(3).toml --out $(1) 2>&1 | tee -a $(1)/log.txt
	@touch $$@
endef

# The embedded model from nothing.
$(eval $(call stage,runs/vae,train_vae,sprites))
$(eval $(call stage,runs/bank,latents,sprites,runs/vae))
$(eval $(call stage,runs/teacher,teacher,sprites,runs/bank))

$(eval $(call stage,runs/rich/vae,train_vae,scenes,runs/vae))
$(eval $(call stage,runs/rich/bank,latents,scenes,runs/rich/vae))
$(eval $(call stage,runs/rich/teacher,teacher,scenes,runs/teacher runs/rich/bank))
$(eval $(call stage,runs/rich/student,next_chunk,scenes,runs/rich/teacher))

$(eval $(call stage,runs/switches/vae,train_vae,switches,runs/rich/vae))
$(eval $(call stage,runs/switches/bank,latents,switches,runs/rich/vae))
$(eval $(call stage,runs/switches/student,next_chunk,switches,runs/rich/student runs/switches/bank))
$(eval $(call stage,runs/unified,next_chunk,unified,runs/switches/student))

embedded: runs/unified/.done runs/switches/vae/.done  ## train the embedded model from nothing to out/sprites: hours; goes on where it was stopped
	$(BIN)/python -m distill assemble --teacher runs/rich/teacher/teacher --vae runs/switches/vae/vae \
		--student runs/unified/student.pt --out $(OUT)
	$(BIN)/python -m distill evaluate --model $(OUT) --prompts 64 --seed 20
	$(BIN)/python -m distill evaluate --model $(OUT) --prompts 32 --seed 20 --switch

# The experiments start from the embedded model as it is.
$(eval $(call stage,runs/experiments/bank,latents,rl))

ablation: runs/experiments/bank/.done  ## train and score students by training by steps; goes on where it was stopped; JOBS=2
	$(BIN)/python -m distill ablation --config $(CONFIGS)/ablation.toml --out runs/experiments/ablation --jobs $(or $(JOBS),1)

ablation-rl: runs/experiments/bank/.done  ## what RL and distribution matching gain where a student has room
	$(BIN)/python -m distill ablation --config $(CONFIGS)/rl.toml --out runs/experiments/rl --results docs/results/rl --jobs $(or $(JOBS),1)
