from variants import *
def flat(s): return s.replace('if (wanted[i] && !has(found[i])) found[i] = look(items[i]);','if (wanted[i]) found[i] = look(items[i]);')
def one_first(s):
    return s.replace('  do {\n    deadline.check();\n    all = true;','  if (wanted[0]) while (!has(found[0])) { deadline.check(); found[0] = look(items[0]); }\n  do {\n    deadline.check();\n    all = true;',1)
EV='''
__device__ inline void copy_once(void* to, const void* global, u32 bytes, u64* bar) {
  u64 policy; asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
               " [%0], [%1], %2, [%3], %4;"
               :: "r"(shared_address(to)), "l"(global), "r"(bytes), "r"(shared_address(bar)), "l"(policy) : "memory");
}
'''
def evict(s):
    i=s.index('__device__ constexpr int larger'); s=s[:i]+EV+s[i:]
    assert 'copy_in(s.ring[place.slot] + lane * PITCH' in s
    return s.replace('copy_in(s.ring[place.slot] + lane * PITCH','copy_once(s.ring[place.slot] + lane * PITCH')
if __name__=='__main__':
    add('0.6B b1','0.6B',1,check=[[400],[1],[2],[257],[1500]])
    add('0.6B b1 prof','0.6B',1,prof=True)
    add('0.6B b1 fly 1','0.6B',1,fly=1)
    add('0.6B b1 fly 1 prof','0.6B',1,fly=1,prof=True)
    add('0.6B b1 fly 3','0.6B',1,fly=3)
    add('0.6B b1 flat','0.6B',1,edit=flat)
    add('0.6B b1 part 32','0.6B',1,part=32)
    add('0.6B b1 part 128','0.6B',1,part=128)
    add('0.6B b1 evict','0.6B',1,edit=evict)
    add('0.6B b1 fly 1 evict','0.6B',1,edit=evict,fly=1)
    add('0.6B b2','0.6B',2,check=[[400,37]])
    add('0.6B b4','0.6B',4,check=[[400,0,257,1]])
    add('0.6B b8','0.6B',8,check=[[400,0,257,1,38,700,2,256]])
    add('0.6B b8 prof','0.6B',8,prof=True)
    add('0.6B b8 one','0.6B',8,edit=one_first)
    add('0.6B b8 flat','0.6B',8,edit=flat)
    add('0.6B b8 fly 1','0.6B',8,fly=1)
    add('0.6B b8 fly 4','0.6B',8,fly=4)
    add('0.6B b16','0.6B',16,check=[[400,0,257,1,38,700,2,256]+[300+i for i in range(8)]])
    add('0.6B b16 prof','0.6B',16,prof=True)
    add('0.6B b1 ctx 1500','0.6B',1,ctx=1500)
    add('1B b1','1B',1,check=[[400]])
    add('8B b1','8B',1)
    save()
