import sys,time,random
sys.path.insert(0,'/work/wt/tests/tests'); sys.path.insert(0,'/work/wt/tests')
import test_cuda_decode_layers as T, cuda_machine
start=int(sys.argv[1]); end=time.time()+float(sys.argv[2]); n=0; worst=0
s=start
while time.time()<end:
    s+=1; r=random.Random(s)
    while True:
        B=r.choice([1,1,2,3,4,5,8,9,16]); K=r.choice([1,1,2,3]); G=r.randint(1,8); H=r.choice([32,64,64,128])
        S=r.choice([1,1,2,3,4,8,16]); blocks=r.choice([0,0,1,3,7])+max(B*K*S,r.choice([1,2,5,9,20]))
        if blocks<=40: break
    D=32*r.randint(1,12); F=32*r.randint(1,12)
    if r.random()<.15: D=32*r.randint(33,36)
    if r.random()<.15: F=32*r.randint(33,66)
    st=r.randint(1,6)
    most=r.choice([20,140,300,129*S+20])
    ctx=[r.choice([0,1,2,16,17,128,129,130,r.randint(1,most),most]) for _ in range(B)]
    if not any(ctx): ctx[0]=5
    L=r.choice([1,2,2,3])
    m=T.Model(B,L,D,G*K,K,H,F,table=-(-max(ctx)//16)+1,qk_norm=r.random()<.6,qkv_bias=r.random()<.4,
      layers_without_rope=tuple(l for l in range(L) if r.random()<.3),blocks=blocks,splits=S,stages=st,in_flight=r.randint(1,st))
    for seed in (s,s+10**6):
        try: e=T.find_error(m,ctx,seed); 
        except Exception as x: e=str(x)[:300]
        if isinstance(e,str) or not e<T.TOO_MUCH: print('BAD',m,ctx,seed,e,flush=True)
        else: worst=max(worst,e)
        n+=1
print(n,'runs',s-start,'models, worst',worst)
